"""The tangent of a sinusoidal time embedding without the wiggle that is finer than any step of a sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smoothed(waves: Callable[[Tensor], Tensor], t: Tensor, frequencies: Tensor, width: float) -> Tensor:
    """Sinusoids of time [B, K] as they are, with the tangent of their average over nearby times.

    A sinusoid of frequency w, averaged over a Gaussian of standard deviation h around each time, is `exp(-(w h)^2 / 2)`
    times itself, and so is its derivative: slow ones keep their tangent, those that turn within h lose it. Values and
    gradients of weights are exactly those of `waves(t)`; only forward-mode AD sees a difference.

    Args:
        waves: t [B] -> sinusoids [B, K], each of one frequency.
        frequencies: [K], radians per unit of t.
        width: h, in units of t; 0: the exact tangent.
    """
    if width == 0:
        return waves(t)
    kept = torch.exp(-0.5 * (frequencies * width) ** 2)
    still, moving = waves(t.detach()), waves(t)
    return still + kept.to(moving.dtype) * (moving - still)
