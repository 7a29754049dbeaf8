"""`flowanchor.load`: a model in one line, images in the next, the same as the programs draw."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flowanchor
import flowanchor.plugins.codecs.identity
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.checkpoints.sharded import write_sharded
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.generation.generator import Generator
from flowanchor.generation.opened import OpenedModel
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler

SIZES = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
TARGET = "flowanchor.plugins.backbones.lightningdit.LightningDiT"
INTERVAL = {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}
SAMPLER = {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2, "grid": None}


def network(**changes) -> LightningDiT:
    torch.manual_seed(1)
    made = LightningDiT(**{**SIZES, **changes})
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def described(**changes):
    config = {
        "backbone": {"_target_": TARGET, **SIZES, **changes},
        "objective": {"interval": INTERVAL},
        "sampler": SAMPLER,
        "codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"},
    }
    return {"format": 1, "kind": "shortcut", "step": 7, "config": config}


@pytest.fixture
def file(tmp_path) -> Path:
    write_consolidated(tmp_path / "a.safetensors", network().state_dict(), described(), "none")
    return tmp_path / "a.safetensors"


def drawn(labels, seed=0, steps=2):
    made, sampler = network(), ConsistencySampler(steps)
    generator = Generator(made, ExpandedInterval(), sampler, flowanchor.plugins.codecs.identity.Identity())
    return torch.cat(list(generator.draw(made.conditioning.request(len(labels), labels), seed, 100)))


def test_images_are_those_of_the_programs(file):
    model = flowanchor.load(file)
    assert isinstance(model, OpenedModel) and model.kind == "shortcut" and model.step == 7
    images = model.sample([0, 1, 2, 1], seed=5)
    assert images.dtype == torch.uint8 and images.shape == (4, 4, 4, 1)
    assert torch.equal(images, drawn([0, 1, 2, 1], seed=5))
    assert torch.equal(model.sample([0, 1, 2, 1], steps=3, seed=5), drawn([0, 1, 2, 1], seed=5, steps=3))
    assert torch.equal(model.sample(torch.tensor([0, 1, 2, 1]), seed=5, batch_size=4), images)
    assert not torch.equal(model.sample([0, 1, 2, 1], seed=6), images)


def test_how_many_and_which_classes(file):
    model = flowanchor.load(file)
    assert torch.equal(model.sample(num_samples=4), drawn([0, 1, 2, 0]))
    assert torch.equal(model.sample(2, num_samples=3), drawn([2, 2, 2]))
    assert model.sample(1).shape[0] == 1
    for wrong in ([3], [-1], [[0]], [0.5]):
        with pytest.raises(ConfigError, match="labels must be whole numbers between 0 and 2"):
            model.sample(wrong)
    for arguments in ({}, {"labels": [0, 1], "num_samples": 3}, {"num_samples": 0}, {"labels": []}):
        with pytest.raises(ConfigError, match="How many images"):
            model.sample(**arguments)


def test_another_sampler(file):
    model = flowanchor.load(file)
    flow = model.sample([0, 1], steps=4, _target_="flowanchor.plugins.samplers.flow.FlowSampler")
    assert flow.shape == (2, 4, 4, 1) and not torch.equal(flow, model.sample([0, 1], steps=4))


def test_a_network_without_classes(tmp_path):
    bare = dict(num_classes=0, class_dropout_prob=0.0)
    write_consolidated(tmp_path / "b.safetensors", network(**bare).state_dict(), described(**bare), "none")
    model = flowanchor.load(tmp_path / "b.safetensors")
    assert model.sample(num_samples=3).shape == (3, 4, 4, 1)
    with pytest.raises(ConfigError, match="without classes"):
        model.sample([0])


def test_everything_that_holds_a_checkpoint_opens(tmp_path, file):
    content = {
        "state_dict": {f"student.{key}": value for key, value in network().state_dict().items()},
        "ema": {"wide": {key: value * 0.5 for key, value in network().state_dict().items()}},
        "flowanchor": described(),
    }
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    torch.save(content, run / "last.ckpt")
    write_sharded(tmp_path / "sharded.ckpt", content)
    expected = drawn([0, 1])
    for path in (tmp_path / "run", run / "last.ckpt", tmp_path / "sharded.ckpt"):
        assert torch.equal(flowanchor.load(path, ema="none").sample([0, 1]), expected), path
        model = flowanchor.load(str(path))
        assert model.ema == "wide" and not torch.equal(model.sample([0, 1]), expected)


def test_settings_of_the_codec(file):
    with pytest.raises(ConfigError, match="has no wieghts: it has _target_"):
        flowanchor.load(file, codec={"wieghts": "vae.pt"})


@pytest.mark.cold
def test_the_package_is_imported_without_pytorch():
    import subprocess

    code = "import sys, flowanchor; flowanchor.load; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------------ the hub's names


def test_a_repository_is_fetched_by_the_hub(file, tmp_path, monkeypatch):
    import huggingface_hub

    from flowanchor.checkpoints.huggingface import write_folder

    write_folder(tmp_path / "cache", network().state_dict(), described(), "none", "# card\n")
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(flowanchor.load("someone/few-step").sample([0, 1]), drawn([0, 1]))
    files = ["README.md", "codec.safetensors", "config.json", "model.safetensors"]
    assert asked == [("someone/few-step", files)], "no pickle is ever fetched"
    (tmp_path / "someone").mkdir()
    file.rename(tmp_path / "someone" / "few-step")
    with pytest.raises(CheckpointError):
        flowanchor.load("someone/few-step")  # what lies here comes first
    assert len(asked) == 1


def test_paths_are_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*arguments, **settings):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for path in (tmp_path / "none", "runs/a.ckpt", "runs/a.safetensors", "a/b/c", "single"):
        with pytest.raises(CheckpointError, match="There is no checkpoint at"):
            flowanchor.load(path)


def test_a_repository_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def fail(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"nothing at someone/few-step, and no repository .*OSError"):
        flowanchor.load("someone/few-step")


def test_arguments_that_are_none(file):
    model = flowanchor.load(file)
    for seed in (-1, 1.5, True, "3"):
        with pytest.raises(ConfigError, match="seed=.* must be a whole number"):
            model.sample([1], seed=seed)
    for labels in ("3", [[1], [2, 3]], [None]):
        with pytest.raises(ConfigError, match="labels must be whole numbers between 0 and 2|How many images"):
            model.sample(labels)
    for settings in ({"noise": 0}, {"noize": 0}, {"guidence_scale": 2}):
        with pytest.raises(ConfigError, match="noise=0 is no tensor|has no setting|unexpected keyword argument"):
            model.sample([1], **settings)


def test_other_ways_to_say_the_same(file):
    model = flowanchor.load(file)
    one = model.sample([2])
    for label in (2, np.int64(2), torch.tensor(2), iter([2]), np.array([2]), (2,)):
        assert torch.equal(model.sample(label), one)
    low = next(flowanchor.load(file, dtype="bfloat16").backbone.blocks.parameters()).dtype
    assert low == next(flowanchor.load(file, dtype=torch.bfloat16).backbone.blocks.parameters()).dtype
    assert flowanchor.load(file, dtype="float32").sample([2]).equal(one)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dtype": "half"}, "dtype=half is not known"),
        ({"codec": "identity"}, "codec= takes settings to replace"),
        ({"text_encoder": {"a": 1}}, "has no text_encoder whose settings"),
    ],
)
def test_what_load_cannot_use(file, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        flowanchor.load(file, **settings)
    with pytest.raises(ConfigError, match="Give a path"):
        flowanchor.load(None)
    with pytest.raises(ConfigError, match="leave out negative"):
        flowanchor.load(file).sample([1], negative="x")
