"""The attention tangent's kernel against the formula in float64: head sizes, strides of networks, odd lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowanchor.jvp.attention import resolve

from .device import CUDA, DEVICE, exactly, needs_it, off

pytestmark = needs_it
BATCH, HEADS = 2, 3
LENGTHS = {"even": (128, 128), "odd": (77, 77), "cross": (65, 131)}
ALLOWED = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def formula(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, dq, dk, dv = (x.double() for x in (q, k, v, dq, dk, dv))
    scale = q.shape[-1] ** -0.5
    p = torch.softmax(q @ k.mT * scale, -1)
    ds = (dq @ k.mT + q @ dk.mT) * scale
    dp = p * (ds - (p * ds).sum(-1, keepdim=True))
    return p @ v, dp @ v + p @ dv


def made(layout: str, tokens: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[B, H, N, d]: in a row, from [B, N, H, d], or a part of a joint projection [B, N, 3, H, d]."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "contiguous": (BATCH, HEADS, tokens, d),
        "transposed": (BATCH, tokens, HEADS, d),
        "joint": (BATCH, tokens, 3, HEADS, d),
    }
    whole = torch.randn(shapes[layout], generator=draw).to(DEVICE, dtype)
    return whole if layout == "contiguous" else (whole[:, :, 2] if layout == "joint" else whole).transpose(1, 2)


# Each combination may be a kernel of its own, which takes seconds to compile.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *((d, "joint", "odd", BF16) for d in (64, 72, 96, 128, 256)),
    *((d, "joint", "cross", BF16) for d in (72, 128)),
    *((72, layout, "odd", BF16) for layout in ("contiguous", "transposed")),
    (72, "joint", "even", BF16),
    (64, "joint", "odd", FP16),
    *((d, "joint", "odd", FP32) for d in (72, 128)),
]


@pytest.mark.parametrize(("d", "layout", "lengths", "dtype"), CASES)
def test_the_kernel_is_the_formula(d, layout, lengths, dtype):
    exactly()
    queries, keys = LENGTHS[lengths]
    q, dq = (made(layout, queries, d, dtype, seed) for seed in (0, 1))
    k, v, dk, dv = (made(layout, keys, d, dtype, seed) for seed in (2, 3, 4, 5))
    attend = resolve("triton" if CUDA else "streaming")
    for found, wanted in zip(attend(q, k, v, dq, dk, dv), formula(q, k, v, dq, dk, dv), strict=True):
        assert found.isfinite().all() and off(found, wanted) <= ALLOWED[dtype]
