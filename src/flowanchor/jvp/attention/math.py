"""The formula as it stands: everything N_q x N_kv is materialised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, [B, *, N_q, d] -> [B, *, N_q, e], written out; differentiable in both ways.

    Unlike its own plain backend, every operator here gets and returns one type: half precision is computed in float32,
    and the result has the dtype of `v`. With torch 2.11 the backward of that backend fails under autocast on CUDA.
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = wide(q), wide(k), wide(v)
        if grouped:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is None:
            p = torch.softmax(scores, -1)
        else:
            # Of a query that may see no key the output is 0, as in PyTorch.
            masked = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores)
            p = torch._safe_softmax(masked, -1)
        return (functional.dropout(p, dropout) @ v).to(dtype)
