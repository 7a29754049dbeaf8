"""Attention's tangent beside PyTorch's forward by each of its kernels, in the layout of a network."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowanchor.jvp.attention import resolve
from gpu.card import milliseconds
from gpu.record import Row

HEADS, HEAD_SIZES, LENGTHS, TOKENS = 16, (64, 72, 128), (256, 1024, 4096, 8192, 16384), 2**14  # tokens in all
FORWARDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
ON_A_CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
TANGENT = 3  # an output and its tangent: six products where a forward has two


def inputs(d: int, tokens: int, batch: int, heads: int, device: str) -> list[Tensor]:
    """q, k after norm and rotation, [B, N, H, d] in memory; v, a part of the joint projection [B, N, 3, H, d]."""

    def dense() -> Tensor:
        return torch.randn(batch, tokens, heads, d, device=device, dtype=torch.bfloat16).transpose(1, 2)

    def part() -> Tensor:
        return torch.randn(batch, tokens, 3, heads, d, device=device, dtype=torch.bfloat16)[:, :, 2].transpose(1, 2)

    return [dense(), dense(), part(), dense(), dense(), part()]


def exact(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Output and tangent by the formula, in float64."""
    q, k, v, dq, dk, dv = (x.double() for x in (q, k, v, dq, dk, dv))
    scale = q.shape[-1] ** -0.5
    p = torch.softmax(q @ k.mT * scale, -1)
    ds = (dq @ k.mT + q @ dk.mT) * scale
    dp = p * (ds - (p * ds).sum(-1, keepdim=True))
    return p @ v, dp @ v + p @ dv


def error(found: tuple[Tensor, Tensor], six: list[Tensor]) -> float:
    """The larger relative error of output and tangent, on some rows of one head."""
    rows = torch.randperm(six[0].shape[2], device=six[0].device)[:64]
    q, k, v, dq, dk, dv = (x[-1:, -1:] for x in six)
    right = exact(q[:, :, rows], k, v, dq[:, :, rows], dk, dv)
    parts = zip(found, right, strict=True)
    return max(float((a[-1:, -1:][:, :, rows].double() - b).norm() / b.norm()) for a, b in parts)


def sweep(d: int, device: str, tiny: bool) -> dict[str, Any]:
    """By length: milliseconds and TFLOP/s of each forward and of the tangent, and the tangent's error."""
    heads, tangent = (2, "streaming") if tiny else (HEADS, "triton" if device == "cuda" else "streaming")
    found: dict[str, Any] = {"tangent": tangent}
    for tokens in (16, 32) if tiny else LENGTHS:
        batch = 1 if tiny else max(1, TOKENS // tokens)
        six = inputs(d, tokens, batch, heads, device)
        product = 2 * batch * heads * tokens**2 * d  # operations of one product
        one: dict[str, Any] = {}
        for name, backend in (FORWARDS if device == "cuda" else ON_A_CPU).items():
            one[name] = _timed(partial(_forward, backend, *six[:3]), 2 * product, device)
        attend = resolve(tangent)
        one["tangent"] = _timed(partial(_tangent, attend, six), 2 * TANGENT * product, device)
        if "missing" not in one["tangent"]:
            one["tangent"]["error"] = error(_tangent(attend, six), six)
        found[str(tokens)] = one
    return found


def _forward(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad(), sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, k, v)


def _tangent(attend: Any, six: list[Tensor]) -> Any:
    with torch.no_grad():
        return attend(*six)


def _timed(call: Any, work: int, device: str) -> dict[str, Any]:
    try:
        call()
        ms = milliseconds(call, device, rep=40)
    except RuntimeError as refusal:  # a kernel that takes no such heads
        return {"missing": str(refusal)[:200]}
    return {"ms": ms, "tflops": work / ms / 1e9}


def rows(device: str, tiny: bool) -> list[Row]:
    return [Row(f"attention, heads of {d}", partial(sweep, d, device, tiny), 60, 10) for d in HEAD_SIZES]
