"""Counted peaks: what the CPU's allocator handed out at most, beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak(call: Callable[[], object]) -> int:
    """Bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        call()
    live = top = 0
    for event in measured.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top
