"""Improved MeanFlow: the same identity as a loss on the velocity, along the network's own flow."""

from __future__ import annotations

from flowanchor.base.broadcast import like
from flowanchor.interfaces import Ask, Point, TermResult
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut


class ImprovedMeanFlowShortcut(MeanFlowShortcut):
    """Regresses `V = F - (r - t) sg(dF/dt)` on the velocity, the product taken along `F(x_t, t, t)` (arXiv 2512.02012).

    MeanFlow's product goes along `x1 - x0`, which is noise around the marginal velocity; here it goes along the
    network's own estimate of it, without gradient. The loss is then a regression whose target is the data's.

    The loss and the direction alone: guidance is that of `teacher=`. With guidance as an input of the network, and a
    velocity head: `WholeImprovedMeanFlow`. The adaptive weight is MeanFlow's.

    Args: as `MeanFlowShortcut`'s.
    """

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, r, v = point
        prediction, tangent = ask.along(ask.fixed(x, t, t), x, t, r)
        compound = prediction - like(r - t, x) * tangent
        return self.weight.term(compound - v, t)
