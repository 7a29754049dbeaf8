"""Nothing is saved, and nothing averaged, from a state that has diverged; a run that ends in one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowanchor.base.files import superseded
from flowanchor.callbacks.checkpointing import BestCheckpoint, LastCheckpoint
from flowanchor.ema import EMA
from flowanchor.errors import NonFiniteLossError
from flowanchor.interfaces import Batch
from flowanchor.jvp import Full
from flowanchor.module import FlowModule
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.data import DataVelocity

pytestmark = pytest.mark.filterwarnings("ignore")


class Spoil(pl.Callback):
    """Writes a value into one weight (or all of a tensor) at the start of a step."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(module.student.parameters()).fill_(self.value)  # type: ignore[union-attr]


class Loud(pl.Callback):
    """The update of one step makes the weights huge but finite: the loss breaks a step later."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                for parameter in module.student.parameters():  # type: ignore[union-attr]
                    parameter.fill_(1e30)


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["host", "device"])  # where skipped steps are counted


def run(
    folder: Path, steps: int, *callbacks: pl.Callback, every: int = 5, resume: bool = False, fused: bool = False
) -> FlowModule:
    torch.manual_seed(0)
    network = LightningDiT(4, 2, 1, 16, 1, 2, num_classes=3, disable_label_dropout=True)
    objective = ComposedObjective(PlainInterval(), Uniform(), FlowMatchingAnchor())
    module = FlowModule(
        network, objective, DataVelocity(), Full(), lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=fused),
    )  # fmt: skip
    data = [(torch.randn(1, 4, 4), torch.tensor(i % 3)) for i in range(8)]

    def collate(items: list[tuple[Tensor, Tensor]]) -> Batch:
        return Batch(*map(torch.stack, zip(*items, strict=True)))

    last = LastCheckpoint(str(folder), every_n_train_steps=every)
    best = BestCheckpoint(
        dirpath=folder, filename="best", monitor="val/loss", auto_insert_metric_name=False, enable_version_counter=False
    )
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        val_check_interval=4,
        enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        callbacks=[*callbacks, EMA(decay=0.5, sigma_rel=0.2, snapshot_every=3), last, best],
    )  # fmt: skip
    loader = DataLoader(data, batch_size=4, collate_fn=collate)
    trainer.fit(module, loader, loader, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    return module


def stored(file: Path) -> dict[str, Any]:
    content = torch.load(file, weights_only=True)
    return {key: content[key] for key in ("global_step", "state_dict", "optimizer_states", "ema")}


def finite(value: Any) -> bool:
    """Of what a file holds: Lightning's own notes of the best value begin at infinity."""
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, (list, tuple)) else True


@FUSED
def test_weights_that_become_nan_reach_no_file(tmp_path: Path, fused: bool) -> None:
    with pytest.raises(NonFiniteLossError, match="no checkpoint was written meanwhile"):
        run(tmp_path, 60, Spoil(17, float("nan")), fused=fused)
    assert stored(tmp_path / "last.ckpt")["global_step"] == 15
    files = [*tmp_path.glob("*.ckpt"), *tmp_path.glob("*.previous")]
    assert len(files) == 3 and all(finite(stored(file)) for file in files)
    from safetensors.torch import load_file

    snapshots = sorted((tmp_path / "ema_snapshots").glob("*"))
    assert [int(file.name[:8]) for file in snapshots] == [3, 6, 9, 12, 15]
    assert all(finite(load_file(file)) for file in snapshots)


@FUSED
def test_averages_do_not_move_while_steps_are_skipped(tmp_path: Path, fused: bool) -> None:
    class Watch(pl.Callback):
        seen: list[int] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
            self.seen.append(ema.updates)

    watch = Watch()
    with pytest.raises(NonFiniteLossError):
        run(tmp_path, 60, watch, Spoil(7, float("inf")), fused=fused)
    assert watch.seen[-1] == 7


@pytest.mark.parametrize("steps", [20, 23])
def test_a_run_that_ends_while_steps_are_skipped_fails(tmp_path: Path, steps: int) -> None:
    with pytest.raises(NonFiniteLossError, match=rf"ended at step {steps}, and its last {steps - 17} steps"):
        run(tmp_path, steps, Spoil(17, float("nan")))
    assert stored(tmp_path / "last.ckpt")["global_step"] == 15 and finite(stored(tmp_path / "last.ckpt"))


def test_a_run_whose_last_update_spoils_the_weights_fails(tmp_path: Path) -> None:
    class Late(Spoil):
        def on_train_batch_start(self, *_: Any) -> None: ...

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == self.step:
                with torch.no_grad():
                    next(module.student.parameters()).fill_(self.value)  # type: ignore[union-attr]

    with pytest.raises(NonFiniteLossError, match=r"ended at step 12 with weights.*last.ckpt is of step 10"):
        run(tmp_path, 12, Late(12, float("nan")))
    assert stored(tmp_path / "last.ckpt")["global_step"] == 10


@FUSED
def test_a_checkpoint_after_which_every_step_failed_is_put_aside(tmp_path: Path, fused: bool) -> None:
    """The update of step 10 spoils the weights, last.ckpt is written, and the first bad loss comes after that."""
    with pytest.raises(NonFiniteLossError):
        run(tmp_path, 60, Loud(10), fused=fused)
    assert stored(tmp_path / "last.ckpt")["global_step"] == 5
    assert stored(tmp_path / "last.ckpt.diverged")["global_step"] == 10
    assert not superseded(tmp_path / "last.ckpt").exists()
    module = run(tmp_path, 12, resume=True, fused=fused)
    assert module.trainer.global_step == 12 and stored(tmp_path / "last.ckpt")["global_step"] == 12


def test_a_checkpoint_that_was_resumed_from_is_not_put_aside(tmp_path: Path) -> None:
    """A run that fails from its first step on may have got bad settings or bad data: nothing is taken away."""
    run(tmp_path, 10)
    with pytest.raises(NonFiniteLossError):
        run(tmp_path, 60, Spoil(10, float("nan")), resume=True)
    assert stored(tmp_path / "last.ckpt")["global_step"] == 10


def test_a_value_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    best = BestCheckpoint(dirpath=tmp_path, monitor="val/loss")
    trainer = type("Trainer", (), {})()
    assert best.check_monitor_top_k(trainer, torch.tensor(float("nan"))) is False
    assert best.check_monitor_top_k(trainer, torch.tensor(float("-inf"))) is False
    assert "ModelCheckpoint" in best.state_key
