"""The adaptive power weight: a sample counts less the larger its error is."""

from __future__ import annotations

from torch import Tensor

from flowanchor.interfaces import Weight


class PowerWeight(Weight):
    """`e / sg(e + epsilon)^power` of a sample's mean squared error `e` (FACM: power 0.5; MeanFlow: 1).

    Args:
        power: 0 leaves the error as it is.
        epsilon: keeps the weight of a perfect sample finite.
    """

    def __init__(self, power: float = 0.5, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.power, self.epsilon = power, epsilon

    def forward(self, error: Tensor, t: Tensor) -> Tensor:
        return error / (error.detach() + self.epsilon) ** self.power
