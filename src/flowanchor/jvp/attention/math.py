"""The formula as it stands: everything N_q x N_kv is materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.jvp.attention.base import AttentionTangent, check_shapes, wide


class Math(AttentionTangent):
    """The reference: six matrix products, and four tensors [B, H, N_q, N_kv] at its peak."""

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
        dtype, scale = v.dtype, q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = wide(q), wide(k), wide(v)
        dq, dk, dv = (None if tangent is None else wide(tangent) for tangent in (dq, dk, dv))
        p = torch.softmax(q @ k.mT * scale, dim=-1)
        moved = torch.zeros_like(q[..., :1] * v[..., :1, :]) if dv is None else p @ dv
        scores = [a @ b.mT for a, b in ((dq, k), (q, dk)) if a is not None and b is not None]
        if scores:
            weighted = p * (sum(scores[1:], scores[0]) * scale)
            moved = moved + (weighted - p * weighted.sum(-1, keepdim=True)) @ v
        return (p @ v).to(dtype), moved.to(dtype)
