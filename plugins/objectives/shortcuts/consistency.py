"""The consistency shortcut of FACM: the average velocity from t to the data (or to the end of a segment)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flowanchor.base.broadcast import like
from flowanchor.interfaces import Ask, Point, Reduction, Shortcut, TermResult
from flowanchor.jumps.segments import check_boundaries, segment
from flowanchor.plugins.objectives.weights.power import PowerWeight


class ConsistencyShortcut(Shortcut):
    """Pulls `F(x_t, t)` towards `v + (1 - t) dF/dt` (FACM, arXiv 2507.03738).

    With `sg` the stop-gradient, `g = clamp(sg(F) - (v + (1 - t) dF/dt), -clamp, clamp)` and the target
    `sg(F) - alpha(t) g`, relaxed by `alpha(t) = 1 - t^p`. With `e` the mean squared error of a sample, its loss is
    `beta(t) e / sg(e + epsilon)^power`, `beta(t) = cos(pi t / 2)`.

    `boundaries` cut [0, 1] into segments, each learned by itself: within [a, b] the jump ends at b, so that `b - t`
    takes the place of `1 - t`, and alpha and beta are those of `(t - a) / (b - a)`. That is how a network which knows
    some times only (an expert of Wan 2.2) can be distilled: no target needs what lies beyond.

    Args:
        relaxation_exponent: `p`; null switches the relaxation off (`alpha = 1`).
        clamp: bound on each value of `g`; null switches it off.
        weight_power: `power` of the adaptive weight; 0 switches it off.
        weight_epsilon: `epsilon` of the adaptive weight.
        weight_reduction: whether `e` is the mean (as published) or the sum of a sample's squares.
        time_weight: whether `beta(t)` multiplies the loss.
        boundaries: increasing times within (0, 1); none: one jump to the data from everywhere.
    """

    def __init__(
        self,
        relaxation_exponent: float | None = 0.5,
        clamp: float | None = 1.0,
        weight_power: float = 0.5,
        weight_epsilon: float = 1e-3,
        time_weight: bool = True,
        boundaries: Sequence[float] = (),
        weight_reduction: Reduction = "mean",
    ) -> None:
        super().__init__(PowerWeight(weight_power, weight_epsilon, weight_reduction))
        self.boundaries = check_boundaries(boundaries, "objective.shortcut.boundaries")
        self.relaxation_exponent = relaxation_exponent
        self.clamp = clamp
        self.time_weight = time_weight

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, _, v = point
        start, end = segment(t, self.boundaries)  # 0 and 1 without boundaries
        share = (t - start) / (end - start)  # of the segment that lies behind
        prediction, tangent = ask.along(v, x, t, end)
        fixed = prediction.detach()
        g = fixed - (v + like(end - t, x) * tangent)
        diagnostics = {}
        if self.clamp is not None:
            diagnostics["clamp_share"] = (g.abs() > self.clamp).float().mean()
            g = g.clamp(-self.clamp, self.clamp)
        alpha = 1.0 if self.relaxation_exponent is None else 1 - like(share, x) ** self.relaxation_exponent
        target = fixed - alpha * g
        beta = torch.cos(share * (math.pi / 2)) if self.time_weight else None
        return self.weight.term(prediction - target, t, beta, **diagnostics)
