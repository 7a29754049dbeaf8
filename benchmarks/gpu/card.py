"""What the card can do at most: a matrix product, a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from gpu.record import Row


def milliseconds(call: Callable[[], Any], device: str, rep: int = 70) -> float:
    """The median of many calls, with the caches of the card cleared between them; on a CPU of three."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=15, rep=rep, return_mode="median")
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def peaks(device: str, tiny: bool) -> dict[str, Any]:
    """A bfloat16 product of two square matrices, and a copy of one GiB (read and written)."""
    side, size = (64, 2**16) if tiny else (8192, 2**30)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    big = torch.zeros(size, device=device, dtype=torch.uint8)
    a @ b  # the first product loads its library
    product, copy = milliseconds(lambda: a @ b, device), milliseconds(big.clone, device)
    return {"matrix_tflops": 2 * side**3 / product / 1e9, "copy_tb_s": 2 * size / copy / 1e9}


def rows(device: str, tiny: bool) -> list[Row]:
    return [Row("card", partial(peaks, device, tiny), 60)]
