"""Peaks that do not depend on the machine: counted bytes of live tensors, and what the CPU's allocator handed out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from flowanchor.jvp.live_bytes import LiveBytes, tensors_of

__all__ = ["Collectives", "LiveBytes", "allocator_peak"]


class Collectives(TorchDispatchMode):
    """Counts all-gathers and reduce-scatters inside it, and the bytes of the whole tensors that they make or take."""

    kinds = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter"}

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part, kind in self.kinds.items():
            if func.namespace == "c10d" and part in func.__name__:
                self.calls[kind] += 1
                self.bytes[kind] += max(tensor.nbytes for tensor in tensors_of(args))
        return out


def allocator_peak(run: Callable[[], Any]) -> int:
    """Largest sum of bytes that the CPU's allocator had handed out during `run()`, above what it had before.

    From the memory events of PyTorch's profiler: these include what kernels need for themselves.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    assert recorded.profiler is not None
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return peak
