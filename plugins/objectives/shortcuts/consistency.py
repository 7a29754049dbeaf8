"""The consistency shortcut of FACM: the average velocity from t to the data, in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowanchor.interfaces import Shortcut, TermResult


class ConsistencyShortcut(Shortcut):
    """Pulls `F(x_t, t)` towards `v + (1 - t) dF/dt` (FACM, arXiv 2507.03738).

    With `sg` the stop-gradient, `g = clamp(sg(F) - (v + (1 - t) dF/dt), -clamp, clamp)` and the target
    `sg(F) - alpha(t) g`, relaxed by `alpha(t) = 1 - t^p`. With `e` the mean squared error of a sample, its loss is
    `beta(t) e / sg(e + epsilon)^power`, `beta(t) = cos(pi t / 2)`.

    Args:
        relaxation_exponent: `p`; null switches the relaxation off (`alpha = 1`).
        clamp: bound on each value of `g`; null switches it off.
        weight_power: `power` of the adaptive weight; 0 switches it off.
        weight_epsilon: `epsilon` of the adaptive weight.
        time_weight: whether `beta(t)` multiplies the loss.
    """

    def __init__(
        self,
        relaxation_exponent: float | None = 0.5,
        clamp: float | None = 1.0,
        weight_power: float = 0.5,
        weight_epsilon: float = 1e-3,
        time_weight: bool = True,
    ) -> None:
        super().__init__()
        self.relaxation_exponent = relaxation_exponent
        self.clamp = clamp
        self.weight_power = weight_power
        self.weight_epsilon = weight_epsilon
        self.time_weight = time_weight

    def loss(
        self, prediction: Tensor, tangent: Tensor, velocity: Tensor, t: Tensor, end: Tensor | None = None
    ) -> TermResult:
        times = t.view(-1, *[1] * (prediction.ndim - 1))  # [B, 1, *]
        fixed = prediction.detach()
        residual = fixed - (velocity + (1 - times) * tangent)  # [B, C, *]
        diagnostics = {}
        if self.clamp is not None:
            diagnostics["clamp_share"] = (residual.abs() > self.clamp).float().mean()
            residual = residual.clamp(-self.clamp, self.clamp)
        relaxation = 1.0 if self.relaxation_exponent is None else 1 - times**self.relaxation_exponent
        target = fixed - relaxation * residual
        error = (prediction - target).square().flatten(1).mean(1)  # [B]
        loss = self.weighted(error, t)
        if self.time_weight:
            loss = torch.cos(t * (math.pi / 2)) * loss
        return TermResult(loss, {"error": error.detach()}, diagnostics)
