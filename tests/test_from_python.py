"""Training and drawing from Python, without a configuration."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flowanchor
from flowanchor.ema import EMA
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.jvp import Chain, Full
from flowanchor.module import FlowModule
from flowanchor.plain_network import PlainNetwork
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.programs.train import build_module

NETWORK = partial(
    LightningDiT.from_preset, "nano", depth=1, hidden_size=16, num_heads=2, input_size=4, in_channels=1, num_classes=2
)


class Net(nn.Module):
    """Nothing of ours: F(x, t, label) of images [B, 1, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.outward = nn.Linear(16, 32), nn.Linear(32, 16)
        self.time, self.label = nn.Linear(1, 32), nn.Embedding(2, 32)

    def forward(self, x, t, cond):
        hidden = torch.tanh(self.inward(x.flatten(1)) + self.time(t[:, None]) + self.label(cond))
        return self.outward(hidden).view_as(x)


def facm():
    return ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), ConsistencyShortcut())


def loader():
    """Class 0 is dark, class 1 bright."""
    labels = torch.arange(64) % 2
    images = (labels * 1.6 - 0.8).float().view(-1, 1, 1, 1).expand(64, 1, 4, 4).contiguous()
    return DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)


def fit(module, folder, steps, **options):
    trainer = pl.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, inference_mode=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, loader())
    trainer.save_checkpoint(folder / "mine.ckpt")
    return trainer


def test_a_backbone_trains_on_a_loader_of_ones_own_and_opens_again(tmp_path):
    module = FlowModule.from_parts(NETWORK, facm(), DataVelocity(), class_names=["dark", "bright"], seed=1)
    assert isinstance(module.engine, Chain)
    fit(module, tmp_path, 3, callbacks=[EMA(decay=0.5)])
    model = flowanchor.load(tmp_path / "mine.ckpt")
    assert (model.step, model.ema, model.class_names) == (3, "constant_0.5", ("dark", "bright"))
    raw = flowanchor.load(tmp_path / "mine.ckpt", ema="none").backbone.state_dict()
    assert all(torch.equal(value, module.student.state_dict()[name]) for name, value in raw.items())
    images = model.sample(["bright", "dark"], steps=1)
    assert images.shape == (2, 4, 4, 1) and torch.equal(images, model.sample([1, 0], steps=1))


def test_a_plain_module_learns_with_jvp_full(tmp_path):
    """Enough to tell bright from dark in one step: which a loss that reaches no weight would not."""
    optimizer = partial(torch.optim.Adam, lr=3e-2)
    module = FlowModule.from_parts(
        Net, facm(), DataVelocity(), optimizer=optimizer, sample_shape=(1, 4, 4), classes=2,
        sampler=partial(ConsistencySampler, steps=1), class_names=["dark", "bright"],
    )  # fmt: skip
    assert isinstance(module.engine, Full)
    fit(module, tmp_path, 60)
    with pytest.raises(CheckpointError, match="Net"):  # what a file names is not run
        flowanchor.load(tmp_path / "mine.ckpt")
    model = flowanchor.load(tmp_path / "mine.ckpt", network=PlainNetwork(Net(), (1, 4, 4), classes=2))
    dark, bright = (model.sample(name, num_samples=50).float().mean() for name in ("dark", "bright"))
    assert dark < 90 and bright > 165, (dark, bright)
    with pytest.raises(ConfigError, match="PlainNetwork"):
        flowanchor.load(tmp_path / "mine.ckpt", network=Net())
    with pytest.raises(CheckpointError, match="does not fit"):
        flowanchor.load(tmp_path / "mine.ckpt", network=PlainNetwork(nn.Linear(2, 2), (1, 4, 4)))


def test_a_plain_module_needs_an_engine_without_stages(tmp_path):
    module = FlowModule.from_parts(
        Net, facm(), DataVelocity(), engine=Chain(), sample_shape=(1, 4, 4), classes=2
    )  # fmt: skip
    with pytest.raises(ConfigError, match="stages"):
        fit(module, tmp_path, 1)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"network": NETWORK()}, r"network=partial\(LightningDiT, \.\.\.\)"),
        ({"network": Net}, r"add sample_shape=\(channels, height, width\)"),
        ({"network": partial(dict, a=1)}, "is no torch.nn.Module"),
        ({"class_names": ["one"]}, "There are 1 class_names, and the network has 2 classes"),
        ({"sampler": "consistence"}, "Unknown option 'consistence' for sampler: choose one of consistency, flow"),
        ({"codec": 3}, "codec=3: give the name of an option"),
        ({"sampler": partial(ConsistencySampler, grid=torch.zeros(2))}, "A checkpoint cannot keep what sampler"),
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_cannot_be_are_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FlowModule.from_parts(**{"network": NETWORK, "objective": facm(), "velocity": DataVelocity(), **arguments})


def test_other_loaders_are_told_what_is_wanted(tmp_path):
    module = FlowModule.from_parts(NETWORK, facm(), DataVelocity())
    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False
    )
    with pytest.raises(ConfigError, match="The loader yields a dict, and a training step takes samples and labels"):
        trainer.fit(module, DataLoader([{"x": torch.zeros(1, 4, 4)}] * 4))


def test_compose_is_what_the_program_would_run_with():
    cfg = flowanchor.compose("experiment=digits_teacher optimizer.lr=5e-4", "seed=3", "name=2026_11_28")
    assert (cfg.seed, cfg.name, cfg.optimizer.lr, cfg.threads) == (3, "2026_11_28", 5e-4, 1)
    assert cfg.callbacks.last.dirpath == "outputs/train/2026_11_28/checkpoints"
    assert "${" not in OmegaConf.to_yaml(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(build_module(cfg).student, LightningDiT)
    assert flowanchor.compose("checkpoint=a", program="sample").checkpoint == "a"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["objective=facn"], "Unknown option 'facn' for objective: did you mean facm"),
        (["trainer.max_stepz=1"], "did you mean trainer.max_steps"),
        (["seed"], "Cannot read the argument 'seed'"),
    ],
    ids=str,
)
def test_errors_of_compose_are_ours(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        flowanchor.compose(*words)


def test_what_a_plugin_refuses_is_its_own_error():
    """Not Hydra's InstantiationException around it."""
    with pytest.raises(ConfigError, match="teacher needs a checkpoint"):
        build_module(flowanchor.compose("teacher=checkpoint"))
    with pytest.raises(ConfigError, match="Unknown setting jvp.recomputed: Chain has no argument recomputed"):
        build_module(flowanchor.compose("+jvp.recomputed=2"))
