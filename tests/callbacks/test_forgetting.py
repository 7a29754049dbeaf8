"""Forgetting: logged over training, of the averaged weights, unnoticed by the training."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.callbacks.forgetting import Forgetting
from flowanchor.data.lightning import LightningData
from flowanchor.ema import EMA
from flowanchor.errors import ConfigError
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp.chain import Chain
from flowanchor.metrics.flow_error import Probe, teacher_network
from flowanchor.module import FlowModule
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.reporting.csv_logger import AppendingCSVLogger


def network() -> LightningDiT:
    torch.manual_seed(1)
    made = LightningDiT(8, 4, 1, 16, 1, 2, num_classes=10, disable_label_dropout=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def train(folder: Path, *callbacks: pl.Callback, taught: bool = True) -> FlowModule:
    pl.seed_everything(0, verbose=False)
    objective = instantiate(compose("objective=facm").objective, _convert_="all")
    velocity = CheckpointVelocity.of_network(network(), Guidance(), ExpandedInterval()) if taught else DataVelocity()
    module = FlowModule(network(), objective, velocity, Chain(), partial(torch.optim.AdamW, lr=1e-3))
    data = DigitsDataModule(batch_size=16, channels=1, size=8, num_classes=10)
    pl.Trainer(
        max_steps=5, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks), accelerator="cpu",
        logger=AppendingCSVLogger(str(folder)), log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False, inference_mode=False,
        limit_val_batches=0,
    ).fit(module, datamodule=LightningData(data))  # fmt: skip
    return module


def logged(folder: Path) -> dict[int, dict[str, float]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as lines:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
    return {
        int(row["step"]): {key: float(value) for key, value in row.items() if key.startswith("forgetting/")}
        for row in rows
        if "forgetting/error" in row
    }


def test_of_the_averages_from_the_start_to_the_end_and_training_does_not_notice(tmp_path):
    forgetting, ema = Forgetting(every_n_steps=2, times=(0.25, 0.75), samples=20), EMA(decay=0.5)
    module = train(tmp_path, ema, forgetting)
    found = logged(tmp_path)
    assert list(found) == [0, 2, 4, 5] == [step for step, _ in forgetting.history]
    assert found[0]["forgetting/cosine"] == pytest.approx(1, abs=1e-6)  # a student begins as its teacher
    assert found[0]["forgetting/from_teacher"] == pytest.approx(0, abs=1e-10)
    assert found[5]["forgetting/from_teacher"] > 1e-6

    plain = train(tmp_path / "plain", EMA(decay=0.5))
    for ours, theirs in zip(module.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    data = DigitsDataModule(batch_size=16, channels=1, size=8, num_classes=10)
    probe, teacher = (
        Probe.of(data.val_dataloader(), 20),
        teacher_network(network().eval(), ExpandedInterval(), Guidance()),
    )
    with ema.swapped(module):
        expected = probe.measure(module.student, module.objective.interval, (0.25, 0.75), teacher)
    raw = probe.measure(module.student, module.objective.interval, (0.25, 0.75), teacher)
    for name in ("error", "from_teacher", "cosine"):
        values = [line.as_dict()[name] for line in expected]
        assert found[5][f"forgetting/{name}"] == pytest.approx(sum(values) / 2, rel=1e-6)
        assert found[5][f"forgetting/{name}_t0.25"] == pytest.approx(values[0], rel=1e-6)
    assert not math.isclose(raw[0].error, expected[0].error, rel_tol=1e-6)  # the two can be told apart


def test_without_a_teacher_only_the_error(tmp_path):
    train(tmp_path, Forgetting(every_n_steps=5, samples=10), taught=False)
    assert all(set(row) == {"forgetting/error", *(f"forgetting/error_t{t:g}" for t in (0.05, 0.25, 0.5, 0.75, 0.95))}
               for row in logged(tmp_path).values())  # fmt: skip


def test_settings_and_option():
    with pytest.raises(ConfigError, match="positive every_n_steps and samples"):
        Forgetting(every_n_steps=0)
    callbacks = compose("callbacks=forgetting").callbacks
    assert set(callbacks) == {*compose().callbacks, "forgetting"}  # the default ones stay
    assert isinstance(instantiate(callbacks.forgetting), Forgetting)
