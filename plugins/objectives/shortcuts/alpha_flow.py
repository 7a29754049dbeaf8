"""alpha-Flow: from flow matching to MeanFlow by a schedule, without a tangent on the way."""

from __future__ import annotations

import math

import torch

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Ask, Point, Reduction, StepNumber, TermResult
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut


class AlphaFlowShortcut(MeanFlowShortcut):
    """Pulls `F(x_t, t, r)` towards `alpha v + (1 - alpha) sg(F(x_s, s, r))` (arXiv 2510.20771).

    `s = t + alpha (r - t)`, `x_s = x_t + (s - t) v`; the target is clipped, and the loss is `alpha e / sg(e + eps)`.
    Rows with `r = t` are flow matching at every alpha: their target is `v`, their loss `e / sg(e + eps)`. At alpha = 1
    all rows are; at alpha = 0 they are MeanFlow's, whose product takes over. alpha falls by a sigmoid,
    `1 - sigmoid(steepness (step - middle) / (end - start))`, and is 1 before `start` and 0 after `end`.

    The opinion `F(x_s, s, r)` is the network's own, not its average's.

    Args:
        share, weight_power, weight_epsilon, weight_reduction: as `MeanFlowShortcut`'s.
        start, end: where alpha leaves 1 and where it has arrived at 0: shares of the run, or training steps where
            `run_steps` is None. As published: 0 and 1 for small networks, 0.5 and 0.83 for XL with guidance.
        run_steps: length of the run in training steps.
        steepness: of the sigmoid between them.
        smallest: alpha is 0 below it, and 1 above 1 minus it.
        clip: bound on each value of the target of rows with 0 < alpha < 1 and r != t; None: no bound.
    """

    asks_elsewhere = True  # at s

    def __init__(
        self,
        share: float = 0.75,
        weight_power: float = 1.0,
        weight_epsilon: float = 1e-3,
        start: float = 0,
        end: float = 1000,
        steepness: float = 25.0,
        smallest: float = 5e-3,
        clip: float | None = 4.0,
        run_steps: int | None = None,
        weight_reduction: Reduction = "mean",
    ) -> None:
        super().__init__(share, weight_power, weight_epsilon, weight_reduction)
        if end <= start:
            raise ConfigError(f"objective.shortcut.end={end} must come after objective.shortcut.start={start}.")
        if run_steps is not None:
            if run_steps < 1:
                raise ConfigError(
                    f"objective.shortcut.run_steps={run_steps}: alpha falls over a share of the run, whose length is "
                    "not known: set trainer.max_steps, or objective.shortcut.run_steps to the steps that it falls over."
                )
            if not 0 <= start < end <= 1:
                raise ConfigError(
                    f"objective.shortcut.start={start} and end={end} are shares of the run, between 0 and 1: for "
                    "training steps set objective.shortcut.run_steps=null."
                )
            start, end = start * run_steps, end * run_steps
        self.start, self.stop, self.steepness, self.smallest, self.clip = start, end, steepness, smallest, clip
        self.now = StepNumber(1.0)  # alpha
        self.at_step(0)

    def at_step(self, step: int) -> None:
        self.now.set(self.alpha(step))
        alpha = self.now.value
        self.doing = "flow" if alpha == 1 else "discrete" if alpha > 0 else "tangent"

    @property
    def phase(self) -> str:
        """`flow`: flow matching; `discrete`: an answer of the network takes the tangent's place; `tangent`."""
        return self.doing

    def alpha(self, step: int) -> float:
        """alpha at a training step."""
        if not self.start < step < self.stop:
            return 1.0 if step <= self.start else 0.0
        progress = (step - self.start) / (self.stop - self.start)
        value = 1 / (1 + math.exp(self.steepness * (progress - 0.5)))
        return 0.0 if value < self.smallest else 1.0 if value > 1 - self.smallest else value

    def loss(self, ask: Ask, point: Point) -> TermResult:
        if self.phase == "tangent":
            return super().loss(ask, point)
        x, t, r, v = point
        alpha = self.now.on(t.device)
        prediction = ask(x, t, r)
        if self.phase == "flow":
            return self.weight.term(prediction - v, t, alpha=alpha.float())
        instant = r == t
        s = t + alpha * (r - t)
        target = alpha * v + (1 - alpha) * ask.fixed(x + like(s - t, x) * v, s, r)
        if self.clip is not None:
            target = target.clamp(-self.clip, self.clip)
        target = torch.where(like(instant, x), v, target)
        factor = torch.where(instant, torch.ones_like(alpha), alpha)
        return self.weight.term(prediction - target, t, factor, alpha=alpha.float())
