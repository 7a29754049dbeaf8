"""Improved MeanFlow: the same identity as a loss on the velocity, along the network's own flow."""

from __future__ import annotations

from torch import Tensor

from flowanchor.interfaces import TermResult
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut


class ImprovedMeanFlowShortcut(MeanFlowShortcut):
    """Regresses `V = F - (r - t) sg(dF/dt)` on the velocity, the product taken along `F(x_t, t, t)` (arXiv 2512.02012).

    MeanFlow's product goes along `x1 - x0`, which is noise around the marginal velocity; here it goes along what the
    network itself believes, told `r = t`, without gradient. The loss is then a regression whose target is the data's.

    Established from the abstract and secondary summaries: the loss and the direction. Left out: guidance scale and
    interval as conditions of the network; guidance is that of `teacher=`. The adaptive weight is MeanFlow's.

    Args: as `MeanFlowShortcut`'s.
    """

    direction = "own"

    def loss(
        self, prediction: Tensor, tangent: Tensor, velocity: Tensor, t: Tensor, end: Tensor | None = None
    ) -> TermResult:
        assert end is not None
        span = (end - t).view(-1, *[1] * (prediction.ndim - 1))
        compound = prediction - span * tangent
        error = (compound - velocity).square().flatten(1).mean(1)
        return TermResult(self.weighted(error, t), {"error": error.detach()})
