"""Times the steps of a run from inside its trainer, and ends it."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch

# Kinds of kernels, by parts of their names; the first that fits counts.
KINDS = (
    ("attention's tangent", ("_kernel",)),
    ("attention", ("flash", "fmha", "attention", "sdpa", "cudnn_generated")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    ("optimizer, averages", ("multi_tensor", "foreach", "adam")),
    ("compiled", ("triton_",)),
    ("communication", ("nccl",)),
    ("copies", ("memcpy", "memset")),
)
OTHER = "elementwise, reductions"


class Clock(pl.Callback):
    """After `warm` steps (compilation, capture): `steps` in a row, some one by one, and one under the profiler.

    What it found is in `Clock.found` after the run: `step_ms` in a row, `host_ms` that the program needs to hand a step
    to an idle device, `device_ms` that its kernels take, images per second, peaks in GB; on a CPU without the device's.

    Args:
        warm: steps that count nothing.
        steps: steps in a row, of which `seconds` may end fewer.
        alone: steps of which each waits for the one before.
    """

    found: dict[str, Any] = {}

    def __init__(self, warm: int = 6, steps: int = 20, seconds: float = 6.0, alone: int = 3) -> None:
        self.warm, self.steps, self.seconds, self.alone = warm, steps, seconds, alone
        self.done = 0
        self.began = self.first = 0.0
        self.row_ends: int | None = None  # the step that ended the row
        self.hosts: list[float] = []
        self.profile: Any = None
        Clock.found = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.cuda = pl_module.device.type == "cuda"
        self.first = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.row_ends is None:
            return
        self._wait()
        if self.cuda and self.done == self.row_ends + self.alone:
            from torch.profiler import ProfilerActivity, profile

            self.profile = profile(activities=[ProfilerActivity.CUDA])  # the host's events take minutes to read
            self.profile.__enter__()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.done += 1
        if self.row_ends is None:
            self._in_a_row(len(batch[0]) * trainer.world_size)
            return
        if self.profile is None:
            self.hosts.append(now - self.began)
            self._wait()
            if self.cuda or len(self.hosts) < self.alone:
                return
        else:
            self._wait()
            self.profile.__exit__(None, None, None)
            self._kernels()
        Clock.found["host_ms"] = 1e3 * statistics.median(self.hosts)
        Clock.found["loss"] = float(trainer.callback_metrics["train/loss"])
        Clock.found["skipped_steps"] = float(trainer.callback_metrics.get("train/nonfinite_steps", 0))
        trainer.should_stop = True

    def _in_a_row(self, images: int) -> None:
        if self.done <= self.warm:
            if self.done == 1:
                self._wait()
                Clock.found["first_step_s"] = time.perf_counter() - self.first
            if self.done == self.warm:
                self._wait()
                Clock.found["warm_s"] = time.perf_counter() - self.first
                if self.cuda:
                    # What lasts from step to step: an eager step takes the rest of `allocated_gb` for itself.
                    Clock.found["held_gb"] = torch.cuda.memory_allocated() / 1e9
                    torch.cuda.reset_peak_memory_stats()
                self.began = time.perf_counter()
            return
        so_far = self.done - self.warm
        if so_far < self.steps and time.perf_counter() - self.began < self.seconds:
            return
        self._wait()
        each = (time.perf_counter() - self.began) / so_far
        self.row_ends = self.done
        Clock.found |= {"step_ms": 1e3 * each, "steps": so_far, "images_per_second": images / each}
        if self.cuda:
            # A graph's own pool is no part of what is allocated while it is replayed.
            Clock.found |= {
                "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
                "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            }

    def _kernels(self) -> None:
        """Milliseconds and launches of one step, by kind of kernel."""
        share: Counter[str] = Counter()
        launches: Counter[str] = Counter()
        for row in self.profile.key_averages():
            if row.self_device_time_total > 0:
                share[_kind(row.key)] += row.self_device_time_total / 1e3
                launches[_kind(row.key)] += row.count
        kinds = {kind: [ms, launches[kind]] for kind, ms in share.most_common()}
        Clock.found |= {"device_ms": sum(share.values()), "launches": sum(launches.values()), "kernels": kinds}

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _kind(kernel: str) -> str:
    name = kernel.lower()
    if name == "_kernel" or name.startswith("_kernel("):
        return KINDS[0][0]
    return next((kind for kind, words in KINDS[1:] if any(word in name for word in words)), OTHER)
