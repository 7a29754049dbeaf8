"""Training speed in images per second."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch

from flowanchor.interfaces import Batch


class Throughput(pl.Callback):
    """Logs `images_per_second`, over all processes: the median of the last `window` batches.

    The median, because a batch after which the run validates, draws a grid or writes a checkpoint takes far longer. On
    a GPU the host runs ahead, so there the ends of the batches are marked on the device, and looked at when something
    is logged.
    """

    def __init__(self, window: int = 50) -> None:
        self._marks: deque[tuple[Any, int]] = deque(maxlen=window + 1)  # when a batch ended, and its images

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._marks.clear()
        self._marks.append((_mark(trainer), 0))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        size = len(batch[0])
        self._marks.append((_mark(trainer), size * trainer.world_size))
        if not _on_cuda(trainer) or trainer._logger_connector.should_update_logs:
            speeds = [images / max(_seconds(a, b), 1e-9) for (a, _), (b, images) in pairwise(self._marks)]
            if speeds:
                pl_module.log("images_per_second", median(speeds), batch_size=size)


def _on_cuda(trainer: pl.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def _mark(trainer: pl.Trainer) -> float | torch.cuda.Event:
    if not _on_cuda(trainer):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(a: Any, b: Any) -> float:
    """Between two marks; the host waits for the later one."""
    if isinstance(a, float):
        return float(b - a)
    b.synchronize()
    return float(a.elapsed_time(b)) / 1000
