"""Checkpoint names, throughput, progress and the CSV log, in small Lightning runs."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.utils.data import DataLoader

import flowanchor.conf
from flowanchor.callbacks.checkpointing import BestCheckpoint, LastCheckpoint
from flowanchor.callbacks.progress import Progress
from flowanchor.callbacks.throughput import Throughput
from flowanchor.ema import EMA
from flowanchor.interfaces import Batch
from flowanchor.reporting.csv_logger import AppendingCSVLogger


class Samples(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((2,), float(index))


def collate(items: list[Tensor]) -> Batch:
    return Batch(torch.stack(items))


class Toy(pl.LightningModule):
    def __init__(self, seconds: float = 0.0, stop_after: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = torch.nn.Linear(2, 2)
        self.seconds, self.stop_after = seconds, stop_after

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.stop_after is not None and self.trainer.global_step >= self.stop_after:
            raise RuntimeError("killed")
        time.sleep(self.seconds)
        loss = self.student(batch.x1).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/anchor", 0.5 * loss, prog_bar=True)
        self.log("train/tangent_norm", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.student(batch.x1).square().mean(), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(), batch_size=4, collate_fn=collate)

    val_dataloader = train_dataloader


def fit(folder: Path, steps: int, *callbacks: pl.Callback, model: Toy | None = None, **options: Any) -> pl.Trainer:
    resume = options.pop("ckpt_path", None)
    options = {"logger": False, "val_check_interval": 3, "log_every_n_steps": 1} | options
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks), accelerator="cpu",
        check_val_every_n_epoch=None, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(model or Toy(), ckpt_path=resume)
    return trainer


def checkpoints(folder: Path) -> list[pl.Callback]:
    """As in conf/callbacks/default.yaml."""
    best = BestCheckpoint(
        dirpath=folder / "checkpoints", filename="best", monitor="val/loss", mode="min", save_top_k=1,
        auto_insert_metric_name=False, enable_version_counter=False,
    )  # fmt: skip
    last = LastCheckpoint(str(folder / "checkpoints"), every_n_train_steps=4)
    return [Progress(plain=True, every_n_steps=100), EMA(decay=0.5), last, best]


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_last_and_best_have_stable_names(tmp_path: Path) -> None:
    fit(tmp_path, 10, *checkpoints(tmp_path))  # 4 and 8 by the interval, 10 because training ends
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "last.ckpt.previous",
    ]
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 10
    assert step_of(tmp_path / "checkpoints/best.ckpt") == 9  # the loss falls, so the latest validation is the best
    fit(tmp_path, 14, *checkpoints(tmp_path), ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "last.ckpt.previous",
    ]
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 14


def test_killed_run_leaves_its_latest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, 20, *checkpoints(tmp_path), model=Toy(stop_after=6))
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 4


def test_throughput_ignores_slow_outliers(tmp_path: Path) -> None:
    class SlowOnce(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                time.sleep(0.6)

    trainer = fit(tmp_path, 9, Throughput(), SlowOnce(), Progress(plain=True), model=Toy(seconds=0.02),
                  enable_checkpointing=False)  # fmt: skip
    assert 40 < float(trainer.callback_metrics["images_per_second"]) < 200  # 4 images in a little over 0.02 s


def test_progress_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, 10, Throughput(), Progress(every_n_steps=4), enable_checkpointing=False)  # pytest's pipe: plain
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    for word in ("loss ", "anchor ", "val ", "img/s "):
        assert word in lines[1]
    assert "tangent_norm" not in lines[1]
    assert "0:00 left" in lines[0] and "left" not in lines[-1]


def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import rich

    screen = io.StringIO()
    bar = Progress(plain=False, every_n_steps=4)
    bar._console_kwargs = {"file": screen, "force_terminal": True, "width": 160}
    fit(tmp_path, 10, Throughput(), bar, enable_checkpointing=False, model=Toy(seconds=0.05))
    rich.reconfigure()
    text = screen.getvalue()
    assert "Training" in text and "10/10" in text and "loss:" in text and "anchor:" in text and "img/s:" in text
    assert "step 4/10" not in text


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_csv_log_continues_after_a_kill(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):  # logs steps 0..6, its checkpoint is of step 4
        fit(tmp_path, 20, *checkpoints(tmp_path), model=Toy(stop_after=7), logger=AppendingCSVLogger(str(tmp_path)))
    before = [r for r in rows(tmp_path) if r["train/loss"]]
    losses = [r["train/loss"] for r in before]
    assert [int(r["step"]) for r in before] == list(range(7))
    fit(tmp_path, 10, *checkpoints(tmp_path), Throughput(), logger=AppendingCSVLogger(str(tmp_path)),
        ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))  # fmt: skip
    after = rows(tmp_path)
    assert [int(r["step"]) for r in after if r["train/loss"]] == list(range(10))  # each once
    assert [r["train/loss"] for r in after if r["train/loss"]][:4] == losses[:4]
    assert all(r["images_per_second"] for r in after if r["train/loss"] and int(r["step"]) >= 4)  # a new column
    assert [int(r["step"]) for r in after if r["val/loss"]] == [2, 5, 8]


def test_csv_log_starts_anew_with_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        fit(tmp_path, 5, Progress(plain=True), logger=AppendingCSVLogger(str(tmp_path)), enable_checkpointing=False)
    assert [int(r["step"]) for r in rows(tmp_path) if r["train/loss"]] == list(range(5))


@pytest.mark.parametrize("choice", ["callbacks=none", "logger=none", "logger=wandb", "logger=tensorboard", "ema=none"])
def test_choices_compose(choice: str) -> None:
    group = choice.split("=")[0]
    folder = str(Path(next(iter(flowanchor.conf.__path__))).resolve())
    with initialize_config_dir(folder, version_base="1.3"):
        cfg = compose(overrides=[f"+{choice}", "+name=null"])
    expected = {"logger=wandb": {"csv", "wandb"}, "logger=tensorboard": {"csv", "tensorboard"}}.get(choice, set())
    assert set(cfg[group]) == expected
