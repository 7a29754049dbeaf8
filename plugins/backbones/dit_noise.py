"""From DiT's noise prediction to a velocity: the one place where its diffusion meets our flow.

DiT (arXiv 2212.09748) was trained on `z_s = sqrt(a_s) x1 + sqrt(1 - a_s) eps` at levels s = 0..999 of a linear schedule
(betas 1e-4 to 0.02, Ho et al. 2020) and predicts `eps`. Our flow has `x_t = (1 - t) x0 + t x1`, so

- `z = x_t / sqrt(t^2 + (1 - t)^2)` has unit scale, and the level s(t) is the one with the same signal-to-noise ratio;
- `x0 = eps`, hence `v = x1 - x0 = (x_t - eps) / t`.

Levels between the trained ones are interpolated in the logarithm of that ratio, so that s(t) has a derivative. Outside
of what was trained (t < 0.0064 and t > 0.99) the level stays at its end; there, near the noise, the velocity is that of
the data which the last level predicts, and finite.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEVELS = 1000


def _table() -> np.ndarray:
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, LEVELS))
    return 0.5 * np.log((1 - kept) / kept)


_LOG_RATIOS = _table()
_ON: dict[torch.device, Tensor] = {}


def _log_ratios(device: torch.device) -> Tensor:
    """log(noise / signal) of each level, float64 [1000], increasing; the same tensor each time."""
    if device not in _ON:
        with torch.inference_mode(False):  # what is kept must not remember the mode that it was made in
            ratios = torch.from_numpy(_LOG_RATIOS).to(device)
        if type(ratios) is not Tensor:  # a fake one
            return ratios
        _ON[device] = ratios
    return _ON[device]


def trained_range(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The times of the last and of the first level, float64 scalars: the noisiest and the cleanest that DiT knows."""
    ratios = _log_ratios(device or torch.device("cpu"))
    return torch.sigmoid(-ratios[-1]), torch.sigmoid(-ratios[0])


def unit_scale(t: Tensor) -> Tensor:
    """Times [B] -> the factor [B] that gives `x_t` DiT's scale."""
    return torch.rsqrt(t.square() + (1 - t).square())


def noise_level(t: Tensor) -> Tensor:
    """Times [B] -> levels [B] in [0, 999], differentiable."""
    ratios = _log_ratios(t.device)
    low, high = trained_range(t.device)
    inside = t.double().clamp(low, high)
    ratio = torch.log1p(-inside) - torch.log(inside)
    above = torch.searchsorted(ratios, ratio.detach()).clamp(1, LEVELS - 1)
    before, after = ratios[above - 1], ratios[above]
    return (above - 1 + (ratio - before) / (after - before)).clamp(0, LEVELS - 1).to(t.dtype)


def velocity(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """`x_t` [B, *], times [B] and the predicted noise [B, *] -> velocity [B, *], finite for all t in [0, 1]."""
    shape = (-1, *[1] * (x.dim() - 1))
    time = t.view(shape)
    low, _ = trained_range(t.device)
    lowest = low.to(t.dtype)
    known = (x - eps) / time.clamp(min=lowest)
    # The data that the noisiest level predicts: x1 = (z - sqrt(1 - a) eps) / sqrt(a), at its own scale and level.
    scale = torch.rsqrt(lowest.square() + (1 - lowest).square())
    data = (x * unit_scale(t).view(shape) / scale - (1 - lowest) * eps) / lowest
    unknown = (data - x) / (1 - time).clamp(min=0.5)  # finite where it is not chosen, or gradients would not be
    return torch.where(time >= lowest, known, unknown)
