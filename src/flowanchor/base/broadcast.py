"""How one number per sample meets the samples."""

from __future__ import annotations

from torch import Tensor


def like(t: Tensor, x: Tensor) -> Tensor:
    """Numbers of samples, [B], in a shape that broadcasts against the samples `x` [B, *]: [B, 1, ..., 1]."""
    return t.view(-1, *[1] * (x.ndim - 1))
