"""MeanFlow: the average velocity between any two times."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Ask, Interval, Point, Reduction, Shortcut, TermResult, TimeDistribution, Times
from flowanchor.plugins.objectives.weights.power import PowerWeight


class MeanFlowShortcut(Shortcut):
    """Pulls `F(x_t, t, r)` towards `v + (r - t) dF/dt`, `t <= r` (arXiv 2505.13447, in our direction of time).

    A share of the samples has `r = t`: for them `F` is the instantaneous velocity, and this is flow matching. The
    others' ends come with their times: a second draw from the same distribution, the later one of the two being `r`.
    Under an interval that knows the data as the only end (expanded), `r = 1` for them. Conditions are dropped among
    samples with `r = t`.

    Args:
        share: of the samples with `r = t`.
        weight_power, weight_epsilon, weight_reduction: of the adaptive weight `1 / (e + epsilon)^power`, `e` the sum
            (as published, with an epsilon of 0.01) or mean of a sample's squares; `objective/weight=` replaces it.
    """

    drops_instants = True

    def __init__(
        self,
        share: float = 0.75,
        weight_power: float = 1.0,
        weight_epsilon: float = 1e-3,
        weight_reduction: Reduction = "mean",
    ) -> None:
        super().__init__(PowerWeight(weight_power, weight_epsilon, weight_reduction))
        if not 0 <= share <= 1:
            raise ConfigError(f"objective.shortcut.share={share} must be a share between 0 and 1.")
        self.share = share

    def draw(self, time: TimeDistribution, interval: Interval, size: int, device: torch.device | str | None) -> Times:
        first, second = time.sample(size, device), time.sample(size, device)
        return self.times(first, second, torch.rand(size, device=device), interval)

    def times(self, first: Tensor, second: Tensor, coin: Tensor, interval: Interval) -> Times:
        """Two draws of the time distribution and a uniform one, [B] each -> times and ends."""
        if interval.tells_end:
            t, end = torch.minimum(first, second), torch.maximum(first, second)
        else:
            t, end = first, torch.ones_like(first)
        return Times(t, torch.where(coin < self.share, t, end))

    def check(self, interval: Interval) -> None:
        if not interval.tells_end and not interval.separates:
            raise ConfigError(
                f"{type(self).__name__} asks the network for averages of different length at one time, and "
                f"{type(interval).__name__} tells it the time alone: choose objective/interval=auxiliary (any end) or "
                "objective/interval=expanded (the data as the end)."
            )

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, r, v = point
        prediction, tangent = ask.along(v, x, t, r)
        target = v + like(r - t, x) * tangent  # eq. 6, the MeanFlow identity
        return self.weight.term(prediction - target, t)
