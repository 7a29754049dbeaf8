"""alpha-Flow: from flow matching to MeanFlow by a schedule, without a tangent on the way."""

from __future__ import annotations

import math

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Ask, Point, StepNumber, TermResult
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut


class AlphaFlowShortcut(MeanFlowShortcut):
    """Pulls `F(x_t, t, r)` towards `alpha v + (1 - alpha) sg(F(x_s, s, r))` (arXiv 2510.20771).

    `s = alpha r + (1 - alpha) t`, `x_s = x_t + (s - t) v`, weight `1 / alpha`. At alpha = 1 it is flow matching; as
    alpha falls to 0 it becomes MeanFlow, whose product takes over below `smallest`. It falls by a sigmoid in the step.

    Established from a secondary summary: target, weight and shape of the schedule. Not established, hence values: when
    the schedule starts and ends, how steep it is, where it is cut off.

    Args:
        share, weight_power, weight_epsilon: as `MeanFlowShortcut`'s.
        start, end: training steps at which alpha is (nearly) 1 and (nearly) 0.
        steepness: of the sigmoid between them.
        smallest: alpha is 0 below it, and 1 above 1 minus it.
    """

    asks_elsewhere = True  # at s

    def __init__(
        self,
        share: float = 0.75,
        weight_power: float = 1.0,
        weight_epsilon: float = 1e-3,
        start: int = 0,
        end: int = 1000,
        steepness: float = 25.0,
        smallest: float = 5e-3,
    ) -> None:
        super().__init__(share, weight_power, weight_epsilon)
        if end <= start:
            raise ConfigError(f"objective.shortcut.end={end} must come after objective.shortcut.start={start}.")
        self.start, self.stop, self.steepness, self.smallest = start, end, steepness, smallest
        self.now = StepNumber(1.0)  # alpha
        self.at_step(0)

    def at_step(self, step: int) -> None:
        self.now.set(self.alpha(step))
        self.discrete = self.now.value > 0  # whether an answer of the network takes the tangent's place

    @property
    def phase(self) -> str:
        return "discrete" if self.discrete else "tangent"

    def alpha(self, step: int) -> float:
        """alpha at a training step."""
        progress = (step - self.start) / (self.stop - self.start)
        value = 1 / (1 + math.exp(min(60.0, self.steepness * (progress - 0.5))))
        return 0.0 if value < self.smallest else 1.0 if value > 1 - self.smallest else value

    def loss(self, ask: Ask, point: Point) -> TermResult:
        if not self.discrete:
            return super().loss(ask, point)
        x, t, r, v = point
        alpha = self.now.on(t.device)
        prediction = ask(x, t, r)
        s = alpha * r + (1 - alpha) * t
        target = alpha * v + (1 - alpha) * ask.fixed(x + like(s - t, x) * v, s, r)
        error = (prediction - target).square().flatten(1).mean(1)
        return TermResult(self.weight(error / alpha, t), {"error": error.detach()}, {"alpha": alpha.float()})
