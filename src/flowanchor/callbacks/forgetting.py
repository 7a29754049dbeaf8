"""Whether the student forgets the velocity that its shortcut is built on, over training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.callbacks.attached import callback_of, trained
from flowanchor.data.base import FlowDataModule
from flowanchor.data.lightning import data_of
from flowanchor.ema import EMA
from flowanchor.errors import ConfigError
from flowanchor.jvp.stages import is_sharded
from flowanchor.metrics.flow_error import TIMES, FlowError, Probe, Teacher, check_times


class Forgetting(pl.Callback):
    """Logs the error of the flow branch's velocities on held-out samples, at the start, as it trains, and at the end.

    `forgetting/error` is the mean over `times`, `forgetting/error_t0.5` that of one time; with a frozen teacher also
    `from_teacher` and `cosine` (`flowanchor.metrics.flow_error.FlowError`). Of the averaged weights, where there are
    any. Samples and noise are the same every time, and training does not notice.

    Args:
        every_n_steps: optimizer steps between two measurements.
        times: in [0, 1), where the velocity is asked for.
        samples: held-out samples, over all processes.
        seed: of the noise.
    """

    def __init__(
        self, every_n_steps: int = 500, times: Sequence[float] = TIMES, samples: int = 256, seed: int = 0
    ) -> None:
        if every_n_steps < 1 or samples < 1:
            raise ConfigError("callbacks.forgetting needs positive every_n_steps and samples.")
        self.every_n_steps, self.samples, self.seed = every_n_steps, samples, seed
        self.times = check_times(times)
        self.history: list[tuple[int, list[FlowError]]] = []  # of this fit: step and what was measured
        self._probe: Probe | None = None
        self._latest = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.history, self._latest = [], -1
        self._probe = self._held_out(trainer)
        self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def _held_out(self, trainer: pl.Trainer) -> Probe | None:
        data = data_of(trainer)
        loader = data.val_dataloader() if isinstance(data, FlowDataModule) else []
        if not len(loader):
            rank_zero_warn("callbacks.forgetting measures nothing: this data has no held-out samples.")
            return None
        share = -(-self.samples // trainer.world_size)
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
            return Probe.of(loader, share, self.seed, trainer.global_rank * share)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self._probe is None or step == self._latest:
            return
        self._latest = step
        module = trained(pl_module)
        student, interval, velocity = module.student, module.objective.interval, module.velocity

        def teach(x: Tensor, t: Tensor, cond: Any, flow: Tensor) -> Tensor:
            return velocity(x, t, cond, flow, student, interval)

        teacher: Teacher | None = teach if velocity.is_network else None  # others are no network to forget
        ema = callback_of(trainer, EMA) if step else None  # averages begin with the first step
        # Sharded in mixed precision, the parameters are gathered in bfloat16 and need activations to match.
        precision = trainer.precision_plugin.forward_context if is_sharded(student) else nullcontext
        with ema.swapped(module) if ema is not None else nullcontext(), precision():
            found = self._probe.measure(student, interval, self.times, teacher)
        found = [_joined(trainer, line) for line in found]
        self.history.append((step, found))
        for logger in trainer.loggers:
            logger.log_metrics(logged(found), step)


def logged(found: Sequence[FlowError]) -> dict[str, float]:
    """`forgetting/error` and `forgetting/error_t0.5`, and so on."""
    lines: dict[str, float] = {}
    for name in ("error", "from_teacher", "cosine"):
        values = {line.t: line.as_dict()[name] for line in found}
        known = {t: value for t, value in values.items() if value is not None}
        if known:
            lines[f"forgetting/{name}"] = fmean(known.values())
            lines |= {f"forgetting/{name}_t{t:g}": value for t, value in known.items()}
    return lines


def _joined(trainer: pl.Trainer, line: FlowError) -> FlowError:
    """The mean over all processes, which measure equally many samples."""
    if trainer.world_size == 1:
        return line

    def mean(value: float) -> float:
        return float(trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device)))

    if line.from_teacher is None or line.cosine is None:
        return FlowError(line.t, mean(line.error))
    return FlowError(line.t, mean(line.error), mean(line.from_teacher), mean(line.cosine))
