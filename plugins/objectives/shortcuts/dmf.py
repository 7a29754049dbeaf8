"""DMF's MeanFlow: a batch of two halves, each with times of its own, and a learned weight of both times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Ask, Interval, Point, Reduction, TermResult, TimeDistribution, Times, Weight
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut
from flowanchor.plugins.objectives.times.logit_normal import LogitNormal


class EndVarianceWeight(Weight):
    """`log(e / exp(w) + epsilon) + w`, with `w` a linear function of the time and the end, zero at first.

    Its parameters are the objective's own: they are in the optimizer and in the checkpoint.
    """

    def __init__(self, epsilon: float = 0.01, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        if epsilon <= 0:
            raise ConfigError(f"objective.shortcut.weight_epsilon={epsilon} must be above 0, for example 0.01.")
        self.epsilon = epsilon
        self.linear = nn.Linear(2, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, error: Tensor, t: Tensor) -> Tensor:
        """Errors [B], times and ends [B, 2] -> losses [B]."""
        with torch.autocast(t.device.type, enabled=False):
            w = self.linear(t.to(self.linear.weight.dtype)).squeeze(1).to(error.dtype)
        return torch.log(error / w.exp() + self.epsilon) + w


class DecoupledMeanFlowShortcut(MeanFlowShortcut):
    """Pulls `F(x_t, t, r)` towards `v + (r - t) dF/dt` (arXiv 2510.24474), for `objective/interval=decoupled` first.

    A share of every batch, its first samples, has `r = t` and times of `objective.time`; the others have two times, one
    of either logit-normal, in their order. Under an interval that knows the data as the only end, `r = 1` for them.

    Args:
        share: of the batch with `r = t`.
        early_mean, late_mean, std: of the two logits of a time (of 1 - t, as published: 0.4, -1.2, 1).
        weight_epsilon, weight_reduction: of `EndVarianceWeight`. Which reduction the published 0.01 stands beside could
            not be established.
    """

    def __init__(
        self,
        share: float = 0.5,
        early_mean: float = -0.4,
        late_mean: float = 1.2,
        std: float = 1.0,
        weight_epsilon: float = 0.01,
        weight_reduction: Reduction = "mean",
    ) -> None:
        super().__init__(share)
        self.weight = EndVarianceWeight(weight_epsilon, weight_reduction)
        self.early, self.late = LogitNormal(early_mean, std), LogitNormal(late_mean, std)

    def draw(self, time: TimeDistribution, interval: Interval, size: int, device: torch.device | str | None) -> Times:
        instants = time.sample(size, device)
        early, late = self.early.sample(size, device), self.late.sample(size, device)
        t, end = torch.minimum(early, late), torch.maximum(early, late)
        if not interval.tells_end:
            t, end = early, torch.ones_like(early)
        instant = torch.arange(size, device=device) < round(self.share * size)
        return Times(torch.where(instant, instants, t), torch.where(instant, instants, end))

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, r, v = point
        prediction, tangent = ask.along(v, x, t, r)
        target = v + like(r - t, x) * tangent
        times = torch.stack([t, r], dim=1) if isinstance(self.weight, EndVarianceWeight) else t
        return self.weight.term(prediction - target, times)
