"""The formula as it stands: everything N_q x N_kv is materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.jvp.attention.base import AttentionTangent, check_shapes, wide


class Math(AttentionTangent):
    """The reference: six matrix products, and three tensors [B, H, N_q, N_kv] at its peak."""

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
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            q, k, v = wide(q) * scale, wide(k), wide(v)
            dq, dk, dv = (None if tangent is None else wide(tangent) for tangent in (dq, dk, dv))
            p = torch.softmax(q @ k.mT, dim=-1)
            moved = torch.zeros_like(q[..., :1] * v[..., :1, :]) if dv is None else p @ dv
            moved_scores = None if dq is None else (dq * scale) @ k.mT
            if dk is not None:
                moved_scores = q @ dk.mT if moved_scores is None else moved_scores.add_(q @ dk.mT)
            if moved_scores is not None:
                weighted = moved_scores.mul_(p)
                moved = moved + weighted.sub_(p * weighted.sum(-1, keepdim=True)) @ v
            return (p @ v).to(dtype), moved.to(dtype)
