"""The kernel behind `Triton` (imported only where the package triton is).

One program computes a tile of queries: it runs over the keys with the running maximum and sums of `Streaming`
(FlashAttention's recurrence, arXiv 2205.14135, carried over to the tangent). A head of size d is held in two parts,
D0 = the largest power of two <= d and D1 = the rest padded to a power of two >= 16, so that 72 costs 80 and not 128.
"""

# mypy: ignore-errors
# ruff: noqa: E741 - O is what the field calls attention's output
from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources  # noqa: F401 - for `tuning`
from triton.testing import do_bench  # noqa: F401

from flowanchor.jvp.attention.tiles import Tile

VERSION = f"triton {triton.__version__}"


@triton.jit
def _part(base, rows, row_stride, columns, size_rows, first, d, kind: tl.constexpr):
    """A tile of rows and of the columns `first + columns` of a head, zeros outside, as `kind`."""
    at = first + columns
    pointers = base + rows[:, None] * row_stride + at[None, :]
    return tl.load(pointers, mask=(rows[:, None] < size_rows) & (at[None, :] < d), other=0.0).to(kind)


@triton.jit
def _offset(batch, batch_stride, head, head_stride):
    """Where a head begins, in 64 bits: inputs may have more than 2^31 values."""
    return batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _kernel(
    Q, K, V, DQ, DK, DV, O, DO, scale_log2, scale, heads, size_q, size_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # Strides come in units of UNIT values, so that the compiler knows where rows begin at whole 16 bytes: of a stride
    # of 72 it would only see that 16 does not divide it, and load two bytes at a time.
    q_b, q_h, q_n, k_b, k_h, k_n = q_b * UNIT, q_h * UNIT, q_n * UNIT, k_b * UNIT, k_h * UNIT, k_n * UNIT
    v_b, v_h, v_n, o_b, o_h, o_n = v_b * UNIT, v_h * UNIT, v_n * UNIT, o_b * UNIT, o_h * UNIT, o_n * UNIT
    # One dimension of programs: the second one of a grid ends at 65,535, which batch * heads may pass.
    tiles_q = tl.cdiv(size_q, BLOCK_Q)
    which = tl.program_id(0) // tiles_q
    batch, head = which // heads, which % heads
    rows = (tl.program_id(0) % tiles_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c0, c1 = tl.arange(0, D0), tl.arange(0, D1 if D1 > 0 else 16)
    q_at, k_at = _offset(batch, q_b, head, q_h), _offset(batch, k_b, head, k_h)
    v_at = _offset(batch, v_b, head, v_h)
    q0 = _part(Q + q_at, rows, q_n, c0, size_q, 0, D, KIND)
    if D1 > 0:
        q1 = _part(Q + q_at, rows, q_n, c1, size_q, D0, D, KIND)
    if HAS_DQ:
        dq0 = _part(DQ + q_at, rows, q_n, c0, size_q, 0, D, KIND)
        if D1 > 0:
            dq1 = _part(DQ + q_at, rows, q_n, c1, size_q, D0, D, KIND)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total, total_moved = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    sum0, moved0 = tl.zeros([BLOCK_Q, D0], tl.float32), tl.zeros([BLOCK_Q, D0], tl.float32)
    if D1 > 0:
        sum1, moved1 = tl.zeros([BLOCK_Q, D1], tl.float32), tl.zeros([BLOCK_Q, D1], tl.float32)
    for start in range(0, size_k, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k0 = _part(K + k_at, keys, k_n, c0, size_k, 0, D, KIND)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = _part(K + k_at, keys, k_n, c1, size_k, D0, D, KIND)
            scores += tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if HAS_DQ or HAS_DK:
            moved_scores = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            if HAS_DQ:
                moved_scores += tl.dot(dq0, tl.trans(k0), input_precision=PRECISION)
                if D1 > 0:
                    moved_scores += tl.dot(dq1, tl.trans(k1), input_precision=PRECISION)
            if HAS_DK:
                dk0 = _part(DK + k_at, keys, k_n, c0, size_k, 0, D, KIND)
                moved_scores += tl.dot(q0, tl.trans(dk0), input_precision=PRECISION)
                if D1 > 0:
                    dk1 = _part(DK + k_at, keys, k_n, c1, size_k, D0, D, KIND)
                    moved_scores += tl.dot(q1, tl.trans(dk1), input_precision=PRECISION)
        scores = tl.where(keys[None, :] < size_k, scores * scale_log2, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - higher)
        maximum = higher
        p = tl.exp2(scores - maximum[:, None])
        total = total * shrink + tl.sum(p, 1)
        v0 = _part(V + v_at, keys, v_n, c0, size_k, 0, D, KIND)
        low = p.to(v0.dtype)
        sum0 = sum0 * shrink[:, None] + tl.dot(low, v0, input_precision=PRECISION)
        moved0 = moved0 * shrink[:, None]
        if D1 > 0:
            v1 = _part(V + v_at, keys, v_n, c1, size_k, D0, D, KIND)
            sum1 = sum1 * shrink[:, None] + tl.dot(low, v1, input_precision=PRECISION)
            moved1 = moved1 * shrink[:, None]
        if HAS_DV:
            moved0 += tl.dot(low, _part(DV + v_at, keys, v_n, c0, size_k, 0, D, KIND), input_precision=PRECISION)
            if D1 > 0:
                moved1 += tl.dot(low, _part(DV + v_at, keys, v_n, c1, size_k, D0, D, KIND), input_precision=PRECISION)
        if HAS_DQ or HAS_DK:
            weighted = p * moved_scores * scale
            total_moved = total_moved * shrink + tl.sum(weighted, 1)
            weighted_low = weighted.to(v0.dtype)
            moved0 += tl.dot(weighted_low, v0, input_precision=PRECISION)
            if D1 > 0:
                moved1 += tl.dot(weighted_low, v1, input_precision=PRECISION)
    share = (total_moved / total)[:, None]
    inside = rows[:, None] < size_q
    o_at = _offset(batch, o_b, head, o_h) + rows[:, None] * o_n
    out0 = sum0 / total[:, None]
    first = inside & (c0[None, :] < D)
    tl.store(O + o_at + c0[None, :], out0.to(O.dtype.element_ty), mask=first)
    tl.store(DO + o_at + c0[None, :], (moved0 / total[:, None] - out0 * share).to(O.dtype.element_ty), mask=first)
    if D1 > 0:
        out1 = sum1 / total[:, None]
        second = inside & (D0 + c1[None, :] < D)
        tl.store(O + o_at + D0 + c1[None, :], out1.to(O.dtype.element_ty), mask=second)
        tl.store(
            DO + o_at + D0 + c1[None, :],
            (moved1 / total[:, None] - out1 * share).to(O.dtype.element_ty),
            mask=second,
        )


def _kind(dtype: torch.dtype) -> tl.dtype:
    """The type of the operands of products: that of the inputs. (Triton's interpreter multiplies no bfloat16.)"""
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def parts(d: int) -> tuple[int, int]:
    """The two widths in which a head of size d is computed; 0 where one is enough."""
    first = max(16, 1 << (d.bit_length() - 1))
    rest = d - first
    return first, 0 if rest <= 0 else max(16, triton.next_power_of_2(rest))


def attention_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    tile: Tile,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """q, dq [B, H, N_q, d], k, v, dk, dv [B, H, N_kv, d] -> O, dO [B, H, N_q, d]; see `AttentionTangent`.

    `precision` is that of products of float32: "ieee" or "tf32x3" or "tf32".
    """
    grid, arguments, options, outputs = launch(q, k, v, dq, dk, dv, scale, tile, precision)
    _kernel[grid](*arguments, **options)
    return outputs


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    tile: Tile,
    precision: str,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any], tuple[Tensor, Tensor]]:
    """Grid, arguments and options of the kernel for these tensors, and the outputs that it will fill."""
    (q, dq), (k, dk), (v, dv) = (_laid_out(value, tangent) for value, tangent in ((q, dq), (k, dk), (v, dv)))
    out, moved = torch.empty_like(q), torch.empty_like(q)
    batch, heads, size_q, d = q.shape
    first, second = parts(d)
    strides = [_stride(x, dimension) for x in (q, k, v, out) for dimension in range(3)]
    # The kernel multiplies in the bits of what it is given: a stride beyond 31 bits is given whole.
    unit = math.gcd(16 // q.element_size(), *strides) if max(strides) < 2**31 else 1
    arguments = (
        q, k, v, q if dq is None else dq, k if dk is None else dk, v if dv is None else dv, out, moved,
        scale * 1.4426950408889634, scale, heads, size_q, k.shape[2], *(stride // unit for stride in strides),
    )  # fmt: skip
    options = {
        "D": d, "D0": first, "D1": second, "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys,
        "HAS_DQ": dq is not None, "HAS_DK": dk is not None, "HAS_DV": dv is not None,
        "PRECISION": precision, "KIND": _kind(q.dtype), "UNIT": unit,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return (triton.cdiv(size_q, tile.queries) * batch * heads,), arguments, options, (out, moved)


def _stride(tensor: Tensor, dimension: int) -> int:
    """In values; 0 where there is nothing to step to, and any number may stand."""
    return tensor.stride(dimension) if tensor.shape[dimension] > 1 else 0


def _laid_out(value: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Channels next to each other, and the tangent laid out as its value: one set of strides serves both."""
    value = value if value.stride(-1) == 1 else value.contiguous()
    if tangent is not None:
        tangent = tangent.to(value.dtype)
        if tangent.stride() != value.stride():
            value, tangent = value.contiguous(), tangent.contiguous()
    return value, tangent
