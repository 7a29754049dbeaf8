"""FlowModule: non-finite steps, what a checkpoint holds, and randomness that is a function of the step."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from flowanchor.callbacks.progress import Progress
from flowanchor.conditioning import Classes
from flowanchor.data.base import FlowDataModule
from flowanchor.data.lightning import LightningData
from flowanchor.errors import ConfigError, NonFiniteLossError
from flowanchor.interfaces import Batch, ObjectiveResult
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Full
from flowanchor.module import FlowModule
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.arctan_lognormal import ArctanLogNormal
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.text.base import Tokens


def network():
    torch.manual_seed(0)
    return LightningDiT(4, 2, 1, 16, 1, 2, num_classes=3, disable_label_dropout=True)


class Breaking(ComposedObjective):
    """FACM whose shortcut term is NaN at the steps in `broken`."""

    broken: tuple[int, ...] = ()
    calls = 0

    def forward(self, *args, **kwargs) -> ObjectiveResult:
        result = super().forward(*args, **kwargs)
        if self.calls in self.broken:
            nan = result.loss * float("nan")
            result = ObjectiveResult(
                nan, {**result.terms, "shortcut": nan.detach()}, result.diagnostics, result.velocity
            )
        self.calls += 1
        return result


def make(velocity=None, broken=(), **settings):
    objective = Breaking(ExpandedInterval(), ArctanLogNormal(), FlowMatchingAnchor(), ConsistencyShortcut())
    objective.broken = tuple(broken)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
    return FlowModule(network(), objective, velocity or DataVelocity(), Full(), optimizer, **settings)


def loader(count=8, size=4):
    torch.manual_seed(3)
    data = [(torch.randn(1, 4, 4), torch.tensor(i % 3)) for i in range(count * size)]
    return DataLoader(
        data, batch_size=size, collate_fn=lambda items: Batch(*map(torch.stack, zip(*items, strict=True)))
    )


class Watch(pl.Callback):
    def __init__(self):
        self.weights, self.moments, self.metrics = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in module.student.parameters()]))
        state = trainer.optimizers[0].state
        self.moments.append(sum(float(s["exp_avg"].abs().sum()) for s in state.values()) if state else 0.0)
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(module, steps, tmp_path, **settings):
    watch = Watch()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[watch], gradient_clip_val=1.0, **settings,
    )  # fmt: skip
    trainer.fit(module, loader())
    return trainer, watch


def test_a_nonfinite_step_is_skipped_counted_and_named(tmp_path):
    module = make(broken=[2])
    with pytest.warns(UserWarning, match="Step 2 was skipped: the shortcut loss was not finite"):
        _, watch = fit(module, 5, tmp_path)
    assert torch.equal(watch.weights[2], watch.weights[1]), "weights stay"
    assert watch.moments[2] == watch.moments[1], "the optimizer's moments stay"
    assert not torch.equal(watch.weights[3], watch.weights[2]), "training goes on"
    assert module.nonfinite_steps == 1
    assert all(torch.isfinite(w).all() for w in watch.weights)
    assert watch.metrics[1]["train/nonfinite_steps"] == 0 and watch.metrics[2]["train/nonfinite_steps"] == 1
    assert watch.metrics[2]["train/shortcut"] != watch.metrics[2]["train/shortcut"], (
        "the log shows the NaN, never a zero"
    )


def test_too_many_in_a_row_stop_the_run(tmp_path):
    module = make(broken=range(2, 100), max_nonfinite_steps=3)
    with (
        pytest.raises(NonFiniteLossError, match=r"step 4: the shortcut loss was not finite 3 times in a row"),
        pytest.warns(UserWarning),
    ):
        fit(module, 8, tmp_path)
    assert all(torch.isfinite(p).all() for p in module.student.parameters())


def test_the_row_is_counted_anew_after_a_good_step(tmp_path):
    module = make(broken=[1, 2, 4, 5], max_nonfinite_steps=3)
    with pytest.warns(UserWarning):
        fit(module, 7, tmp_path)
    assert module.nonfinite_steps == 4


def test_with_accumulation_the_whole_step_is_skipped(tmp_path):
    module = make(broken=[2])
    with pytest.warns(UserWarning, match="shortcut loss"):
        _, watch = fit(module, 3, tmp_path, accumulate_grad_batches=2)
    assert torch.equal(watch.weights[3], watch.weights[1]) and module.nonfinite_steps == 1


def test_what_is_logged(tmp_path):
    _, watch = fit(make(), 2, tmp_path)
    assert {
        "train/loss", "train/anchor", "train/shortcut", "train/tangent_norm", "train/shortcut_clamp_share",
        "train/anchor_mse", "train/anchor_cosine", "train/grad_norm", "train/nonfinite_steps",
    } <= set(watch.metrics[-1])  # fmt: skip
    last = watch.metrics[-1]
    assert last["train/loss"] == pytest.approx(last["train/anchor"] + last["train/shortcut"], rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 2])
def test_both_terms_are_shown_beside_the_loss(tmp_path, warmup):
    """Also those of a run that begins with the anchor alone."""
    module = make()
    module.objective.anchor_warmup_steps = warmup
    trainer, _ = fit(module, 4, tmp_path)
    assert list(Progress(plain=True).get_metrics(trainer, module)) == ["loss", "anchor", "shortcut"]


def test_the_teacher_is_not_saved_with_the_run(tmp_path):
    teacher = network()
    for p in teacher.parameters():
        torch.nn.init.normal_(p, std=0.1)
    module = make(CheckpointVelocity.of_network(teacher, Guidance()))
    trainer, _ = fit(module, 2, tmp_path)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert content["state_dict"] and not [k for k in content["state_dict"] if k.startswith("velocity.")]
    assert content["flowanchor"]["step"] == 2 and content["flowanchor"]["kind"] == "shortcut"

    again = make(CheckpointVelocity.of_network(teacher, Guidance()))
    more = pl.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    more.fit(again, loader(), ckpt_path=path, weights_only=True)
    assert more.global_step == 3
    for ours, theirs in zip(again.velocity.network.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_randomness_is_a_function_of_seed_and_step(tmp_path):
    _, a = fit(make(seed=1), 3, tmp_path)
    torch.manual_seed(99)
    _, b = fit(make(seed=1), 3, tmp_path)
    _, c = fit(make(seed=2), 3, tmp_path)
    assert torch.equal(a.weights[-1], b.weights[-1]) and not torch.equal(a.weights[-1], c.weights[-1])


def test_combinations_are_checked_before_training():
    objective = ComposedObjective(AuxiliaryInterval(), ArctanLogNormal(), FlowMatchingAnchor())
    with pytest.raises(ConfigError, match="auxiliary_time_cond=true"):
        FlowModule(network(), objective, DataVelocity(), Full(), torch.optim.AdamW)


def test_the_networks_are_told_what_stands_for_no_condition(tmp_path):
    """The data's negative prompt reaches the student and a teacher beside it before the first step."""
    told = []

    class Told(Classes):
        def use_null(self, text):
            told.append(text.tokens.shape)

    def told_network():
        network = LightningDiT(4, 2, 1, 16, 1, 2, num_classes=3, disable_label_dropout=True)
        network.conditioning = Told(3)
        return network

    class Data(FlowDataModule):
        null_condition = Tokens(torch.zeros(3, 5))

        def load(self):
            return {}

        def setup(self, stage=None):
            pass

        def train_dataloader(self):
            return loader(count=1)

        def val_dataloader(self):
            return []

    module = make(CheckpointVelocity.of_network(told_network(), Guidance()))
    module.student = told_network()
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=LightningData(Data(1)))
    assert told == [(3, 5), (3, 5)]
