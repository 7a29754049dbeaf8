"""No weight: the mean squared error as it is."""

from __future__ import annotations

from torch import Tensor

from flowanchor.interfaces import Weight


class NoWeight(Weight):
    """The error itself."""

    def forward(self, error: Tensor, t: Tensor) -> Tensor:
        return error
