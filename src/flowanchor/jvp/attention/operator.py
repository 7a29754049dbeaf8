"""An attention tangent as one operator of PyTorch, opaque to whatever traces or compiles what stands around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowanchor.jvp.attention.base import AttentionTangent, check_shapes
from flowanchor.jvp.comparable import comparable

# A number is all that an operator can be told of an object.
_KNOWN: list[AttentionTangent] = []
_NUMBERS: dict[Any, int] = {}


class Opaque(AttentionTangent):
    """Another attention tangent, computed by `torch.ops.flowanchor.attention_tangent`."""

    def __init__(self, attention: AttentionTangent) -> None:
        self.attention, self.number = attention, number(attention)

    def __repr__(self) -> str:
        return f"Opaque({self.attention!r})"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_shapes(q, k, v, dq, dk, dv)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, moved = _operator(q, k, v, dq, dk, dv, scale, self.number)
        return out, moved


def number(attention: AttentionTangent) -> int:
    """The number by which the operator knows an object, or another one with the same settings."""
    settings = type(attention), comparable(vars(attention))
    if settings not in _NUMBERS:
        _NUMBERS[settings] = len(_KNOWN)
        _KNOWN.append(attention)
    return _NUMBERS[settings]


@torch.library.custom_op(
    "flowanchor::attention_tangent",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? dq, Tensor? dk, Tensor? dv, float scale, int number)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),
)
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    number: int,
) -> tuple[Tensor, Tensor]:
    out, moved = _KNOWN[number](q, k, v, dq, dk, dv, scale)
    return _laid_out(out), _laid_out(moved)


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    number: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    out, moved = (v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2) for _ in range(2))
    return out, moved


def _laid_out(tensor: Tensor) -> Tensor:
    """[B, H, N, e] as [B, N, H, e] in memory, which is how the layers around attention want it; no copy where it is."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
