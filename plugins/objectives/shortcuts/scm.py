"""sCM: continuous-time consistency without an anchor, with its three stabilisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowanchor.interfaces import Shortcut, StepNumber, TermResult


class SCMShortcut(Shortcut):
    """Moves `F(x_t, t)` along `-g`, `g = cos(pi t / 2) (sg(F) - (v + (1 - t) w dF/dt))`, normalised (arXiv 2410.11081).

    In the form of a straight flow. `w = min(1, step / warmup_steps)` warms the tangent up; `g` is divided by its root
    mean square plus `normalisation`; the error `mean((F - sg(F) + g)^2)` goes through the weight, learned in the paper
    (`objective/weight=log_variance`).

    Args:
        warmup_steps: steps until the tangent counts wholly; 0: from the start.
        normalisation: what is added to the norm; null: no normalisation.
        time_weight: whether `cos(pi t / 2)` multiplies `g`.
    """

    weight_power = 0.0

    def __init__(self, warmup_steps: int = 10_000, normalisation: float | None = 0.1, time_weight: bool = True) -> None:
        super().__init__()
        self.warmup_steps, self.normalisation, self.time_weight = warmup_steps, normalisation, time_weight
        self.warmth = StepNumber(1.0)  # w
        self.at_step(0)

    def at_step(self, step: int) -> None:
        super().at_step(step)
        self.warmth.set(min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def loss(
        self, prediction: Tensor, tangent: Tensor, velocity: Tensor, t: Tensor, end: Tensor | None = None
    ) -> TermResult:
        times = t.view(-1, *[1] * (prediction.ndim - 1))
        warmth = self.warmth.on(t.device)
        residual = prediction.detach() - (velocity + (1 - times) * warmth * tangent)
        if self.time_weight:
            residual = torch.cos(times * (math.pi / 2)) * residual
        if self.normalisation is not None:
            size = residual.flatten(1).square().mean(1).sqrt().view_as(times)
            residual = residual / (size + self.normalisation)
        error = (prediction - prediction.detach() + residual).square().flatten(1).mean(1)
        return TermResult(self.weighted(error, t), {"error": error.detach()}, {"warmth": warmth.float()})
