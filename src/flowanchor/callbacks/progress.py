"""Progress of a training run: a live bar on a terminal, plain lines in a pipe or a log file."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn, CustomTimeColumn, RichProgressBarTheme
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from flowanchor.module import FlowModule


class Progress(RichProgressBar):
    """Shows steps of the whole run, elapsed time and time left, the loss with its terms, and images per second.

    Lightning's bar counts the batches of an epoch, and an epoch of a small data set is over in an instant. Where the
    output is no terminal, one line is printed every `every_n_steps` instead.

    Args:
        every_n_steps: optimizer steps between two plain lines.
        refresh_rate: redraws per second of the live bar.
        plain: force plain lines (true) or the live bar (false); null: look at the terminal.
    """

    def __init__(self, every_n_steps: int = 50, refresh_rate: int = 5, plain: bool | None = None) -> None:
        super().__init__(refresh_rate=refresh_rate, theme=RichProgressBarTheme(metrics_format=".4g"))
        self.every_n_steps = max(1, every_n_steps)
        self.plain = not Console().is_terminal if plain is None else plain
        self._started, self._first_step, self._printed = 0.0, 0, -1
        self._shown_at = float("-inf")

    @property
    def is_enabled(self) -> bool:
        """Whether the live bar is drawn (asked by Lightning everywhere)."""
        return super().is_enabled and not self.plain

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Losses and their terms, without the prefix, and the speed."""
        logged = trainer.callback_metrics
        terms = {*trainer.progress_bar_metrics, *(pl_module.shown if isinstance(pl_module, FlowModule) else ())}
        names = [n for n in logged if n == "train/loss" or (n in terms and n.startswith("train/"))]
        shown: dict[str, Any] = {n.removeprefix("train/"): float(logged[n]) for n in names}
        for name, label in (("val/loss", "val"), ("images_per_second", "img/s")):
            if name in logged:
                value = float(logged[name])
                shown[label] = f"{value:,.0f}" if name == "images_per_second" else value
        return shown

    def _update_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At most once a second: the values lie on the device, and to show them the host waits for it."""
        now = time.monotonic()
        if now - self._shown_at >= 1 or trainer.global_step == self.total_steps(trainer):
            self._shown_at = now
            super()._update_metrics(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------------ steps

    @staticmethod
    def total_steps(trainer: pl.Trainer) -> int | None:
        """Optimizer steps of the whole run; None where it has no end."""
        total = trainer.estimated_stepping_batches
        return int(total) if total != float("inf") and total >= 0 else None

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        return [
            TextColumn("[progress.description]{task.description}"),
            CustomBarColumn(
                bar_width=24,
                complete_style=self.theme.progress_bar,
                finished_style=self.theme.progress_bar_finished,
                pulse_style=self.theme.progress_bar_pulse,
            ),
            MofNCompleteColumn(),
            CustomTimeColumn(style=self.theme.time),
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step, self._printed = time.perf_counter(), trainer.global_step, -1

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
            self._update(self.train_progress_bar_id, trainer.global_step)

    def _initialize_train_progress_bar_id(self) -> None:
        total = self.total_steps(self.trainer)
        self.train_progress_bar_id = self._add_task(float("inf") if total is None else total, "Training")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)
        step, total = trainer.global_step, self.total_steps(trainer)
        due = step % self.every_n_steps == 0 or step == total
        if self.plain and self._enabled and due and step != self._printed:
            self._printed = step
            print(self._line(trainer, pl_module, step, total), flush=True)

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, total: int | None) -> str:
        parts = [f"step {step}" if total is None else f"step {step:>{len(str(total))}}/{total}"]
        for name, value in self.get_metrics(trainer, pl_module).items():
            parts.append(f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}")
        if total is not None and step < total:
            each = (time.perf_counter() - self._started) / max(1, step - self._first_step)
            minutes, seconds = divmod(round(each * (total - step)), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)
