"""A shortcut in one formula: the identity of average velocities, as a robust regression."""

from __future__ import annotations

import torch.nn.functional as F

from flowanchor.base.broadcast import like
from flowanchor.interfaces import Ask, Point, Shortcut, TermResult


class HuberShortcut(Shortcut):
    """Pulls `F(x_t, t)` towards `v + (1 - t) dF/dt` with a Huber loss, which forgives the outliers of the tangent.

    Args:
        delta: the error at which the loss turns from square to straight.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.delta = delta

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, r, v = point
        prediction, tangent = ask.along(v, x, t, r)
        target = v + like(r - t, x) * tangent  # no gradient: engines detach the tangent
        error = F.huber_loss(prediction, target, reduction="none", delta=self.delta).flatten(1).mean(1)
        return TermResult(error, {"error": error.detach()})
