"""sCM: continuous-time consistency without an anchor, with its three stabilisers."""

from __future__ import annotations

import math

import torch

from flowanchor.base.broadcast import like
from flowanchor.interfaces import Ask, Point, Shortcut, StepNumber, TermResult


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

    def __init__(self, warmup_steps: int = 10_000, normalisation: float | None = 0.1, time_weight: bool = True) -> None:
        super().__init__()
        self.warmup_steps, self.normalisation, self.time_weight = warmup_steps, normalisation, time_weight
        self.warmth = StepNumber(1.0)  # w
        self.at_step(0)

    def at_step(self, step: int) -> None:
        self.warmth.set(min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, r, v = point
        prediction, tangent = ask.along(v, x, t, r)
        fixed, warmth = prediction.detach(), self.warmth.on(t.device)
        g = fixed - (v + like(1 - t, x) * warmth * tangent)
        if self.time_weight:
            g = like(torch.cos(t * (math.pi / 2)), x) * g
        if self.normalisation is not None:
            norm = g.flatten(1).square().mean(1).sqrt()
            g = g / (like(norm, x) + self.normalisation)
        error = (prediction - fixed + g).square().flatten(1).mean(1)
        return TermResult(self.weight(error, t), {"error": error.detach()}, {"warmth": warmth.float()})
