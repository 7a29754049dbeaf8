"""A shortcut in one formula: the identity of average velocities, as a robust regression."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flowanchor.interfaces import Shortcut, TermResult


class HuberShortcut(Shortcut):
    """Pulls `F(x_t, t)` towards `v + (1 - t) dF/dt` with a Huber loss, which forgives the outliers of the tangent.

    Args:
        delta: the error at which the loss turns from square to straight.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.delta = delta

    def loss(
        self, prediction: Tensor, tangent: Tensor, velocity: Tensor, t: Tensor, end: Tensor | None = None
    ) -> TermResult:
        times = t.view(-1, *[1] * (prediction.ndim - 1))  # [B, 1, *]
        target = velocity + (1 - times) * tangent  # no gradient: engines detach the tangent
        error = F.huber_loss(prediction, target, reduction="none", delta=self.delta).flatten(1).mean(1)
        return TermResult(error, {"error": error.detach()})
