"""sCM: continuous-time consistency without an anchor, with its three stabilisers."""

from __future__ import annotations

import math
from typing import Literal

import torch

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Ask, Point, Shortcut, StepNumber, TermResult


class SCMShortcut(Shortcut):
    """Moves `F(x_t, t)` along `-g`, `g = cos(pi t / 2) (sg(F) - (v + (1 - t) w dF/dt))`, normalised (arXiv 2410.11081).

    In the form of a straight flow. `w = min(1, step / warmup_steps)` warms the tangent up; `g` is divided by its norm
    plus `normalisation`; the error of `F - sg(F) + g` goes through the weight, learned in the paper
    (`objective/weight=log_variance`).

    Args:
        warmup_steps: steps until the tangent counts wholly; 0: from the start.
        normalisation: what is added to the norm; null: no normalisation.
        norm: `l2`, that of the whole sample (as published, with the sum of squares as the error), or `rms`, its root
            mean square. The direction is the same; the addend bites where the root mean square of g is
            `normalisation`, or for l2 that divided by the root of the number of values.
        time_weight: whether `cos(pi t / 2)` multiplies `g`.
    """

    def __init__(
        self,
        warmup_steps: int = 10_000,
        normalisation: float | None = 0.1,
        time_weight: bool = True,
        norm: Literal["l2", "rms"] = "l2",
    ) -> None:
        super().__init__()
        if norm not in ("l2", "rms"):
            raise ConfigError(f"objective.shortcut.norm={norm}: choose l2 or rms.")
        self.norm = norm
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
            squares = g.flatten(1).square()
            norm = (squares.sum(1) if self.norm == "l2" else squares.mean(1)).sqrt()
            g = g / (like(norm, x) + self.normalisation)
        return self.weight.term(prediction - fixed + g, t, warmth=warmth.float())
