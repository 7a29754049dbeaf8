"""The adaptive power weight: a sample counts less the larger its error is."""

from __future__ import annotations

from torch import Tensor

from flowanchor.interfaces import Reduction, Weight


class PowerWeight(Weight):
    """`e / sg(e + epsilon)^power` of a sample's squared error `e`.

    As published: FACM power 0.5, epsilon 1e-3 of the mean; MeanFlow and iMF 1, 0.01 of the sum; alpha-Flow 1, 1e-3 of
    the mean.

    Args:
        power: 0 leaves the error as it is.
        epsilon: keeps the weight of a perfect sample finite.
        reduction: `mean` or `sum`: which error of a sample epsilon stands beside.
    """

    def __init__(self, power: float = 0.5, epsilon: float = 1e-3, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.power, self.epsilon = power, epsilon

    def forward(self, error: Tensor, t: Tensor) -> Tensor:
        return error / (error.detach() + self.epsilon) ** self.power
