"""Training speed in images per second."""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import Any

import lightning.pytorch as pl

from flowanchor.interfaces import Batch


class Throughput(pl.Callback):
    """Logs `images_per_second`, over all processes: the median of the last `window` batches.

    The median, because a batch after which the run validates, draws a grid or writes a checkpoint takes far longer.
    """

    def __init__(self, window: int = 50) -> None:
        self._speeds: deque[float] = deque(maxlen=window)
        self._last: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._speeds.clear()
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._last is not None:
            images = len(batch[0]) * trainer.world_size
            self._speeds.append(images / max(now - self._last, 1e-9))
        self._last = now
        if self._speeds:
            pl_module.log("images_per_second", median(self._speeds), batch_size=len(batch[0]))
