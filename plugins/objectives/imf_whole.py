"""Improved MeanFlow whole: guidance as an input of the network, and a velocity of its own beside the average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowanchor.base.broadcast import like
from flowanchor.conditioning import NoCondition
from flowanchor.errors import ConfigError
from flowanchor.guided import Asked
from flowanchor.interfaces import (
    Backbone,
    Batch,
    Guided,
    GuidedTimes,
    Interval,
    Objective,
    ObjectiveResult,
    Question,
    Reduction,
    TangentEngine,
    TermResult,
    TimeDistribution,
    VelocityField,
)
from flowanchor.plugins.objectives.composed import at_least_float32
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut
from flowanchor.plugins.objectives.weights.power import PowerWeight
from flowanchor.velocity import answerable, as_velocity, without_held


class WholeImprovedMeanFlow(Objective):
    """Average velocities under any guidance, learned from the network's own velocity (arXiv 2512.02012).

    Each sample has a scale `w` and an interval of guidance, which the network is told. With V the network's
    instantaneous velocity (its velocity head, or F at `r = t` where it has none), asked without gradient at `x_t`, and
    `w' = w` where `t` lies in the interval, 1 elsewhere:

        v_g = v + (1 - 1 / w') (V(w, label) - V(1, null))

    has its fixed point at the guided velocity of scale `w'`. `U = F - (r - t) sg(dF/dt)`, the product along `V(w')`,
    and V itself are regressed on `sg(v_g)`, each with an adaptive weight. Labels are dropped among samples with
    `r = t`; those have `v_g = v`, and samples with `r = t` the whole interval.

    Args:
        interval: must tell ends; as published their distance, `objective/interval=span`.
        time: of two draws of which `t` is the earlier and `r` the later.
        share: of the samples with `r = t`.
        largest_scale: `w` lies between 1 and it.
        scale_power: its density falls as `w^-scale_power`.
        low_below, high_above: the interval begins at a uniform time in [0, low_below] and ends in [high_above, 1].
        weight_power, weight_epsilon, weight_reduction: of the adaptive weight, as `MeanFlowShortcut`'s.
        velocity_weight: of the velocity head's loss.
    """

    trains_velocity_head = True
    needs_guidance = True

    def __init__(
        self,
        interval: Interval,
        time: TimeDistribution,
        share: float = 0.5,
        largest_scale: float = 8.0,
        scale_power: float = 1.0,
        low_below: float = 0.5,
        high_above: float = 0.5,
        weight_power: float = 1.0,
        weight_epsilon: float = 0.01,
        weight_reduction: Reduction = "sum",
        velocity_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not largest_scale >= 1:
            raise ConfigError(f"objective.largest_scale={largest_scale} must be 1 (no guidance) or more.")
        if not 0 <= low_below <= high_above <= 1:
            raise ConfigError(
                f"objective.low_below={low_below} and objective.high_above={high_above} must be increasing times in "
                "[0, 1]."
            )
        if not 0 <= share <= 1:
            raise ConfigError(f"objective.share={share} must be a share between 0 and 1.")
        self.interval, self.time = interval, time
        self.largest_scale, self.scale_power = largest_scale, scale_power
        self.low_below, self.high_above = low_below, high_above
        self.velocity_weight = velocity_weight
        self.weight = PowerWeight(weight_power, weight_epsilon, weight_reduction)
        self._ends = MeanFlowShortcut(share)

    # --------------------------------------------------------------------------------------------------- what is drawn

    def draw(self, size: int, device: torch.device | str | None = None) -> GuidedTimes:
        t, end = self._ends.draw(self.time, self.interval, size, device)
        assert end is not None
        return GuidedTimes(t, end, self.guidance(torch.rand(size, 3, device=device), t == end))

    def guidance(self, uniform: Tensor, instant: Tensor) -> Tensor:
        """Uniform draws [B, 3], and which samples have `r = t` [B] (bool) -> scale, low and high [B, 3]."""
        first, low, high = uniform.unbind(1)
        low = torch.where(instant, 0.0, self.low_below * low)
        high = torch.where(instant, 1.0, self.high_above + (1 - self.high_above) * high)
        return torch.stack([self.scale(first), low, high], 1)

    def scale(self, uniform: Tensor) -> Tensor:
        """Uniform draws [B] -> scales [B] in [1, largest_scale]: the inverse of their distribution."""
        rest = 1 - self.scale_power
        if rest == 0:
            return self.largest_scale**uniform
        return (1 + uniform * (self.largest_scale**rest - 1)) ** (1 / rest)

    # -------------------------------------------------------------------------------------------------------- the loss

    def forward(
        self,
        student: Backbone,
        batch: Batch,
        velocity: VelocityField,
        engine: TangentEngine,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        end: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> ObjectiveResult:
        x1, cond = batch
        noise = torch.randn_like(x1) if noise is None else noise
        if t is None or end is None:
            t, end, guidance = self.draw(x1.shape[0], x1.device)
        if guidance is None:
            guidance = self.guidance(torch.rand(len(t), 3, device=t.device), t == end)
        kept = student.conditioning.dropped(cond, t == end) if student.training else cond
        times = like(t, x1)
        x_t = ((1 - times) * noise + times * x1).to(x1.dtype)
        v = as_velocity(velocity(x_t, t, kept, x1 - noise, student, self.interval), x1, velocity)
        v = answerable(at_least_float32(v), t, student, velocity)

        scale, low, high = guidance.to(t).unbind(1)
        now = torch.where((low <= t) & (t <= high), scale, torch.ones_like(scale))  # w'
        own = _Velocity(student, engine, self.interval, x_t, t)
        null = student.conditioning.null(cond)
        conditional, unconditional = own(cond, scale), own(null, torch.ones_like(scale))
        guided = v + like(1 - 1 / now, x1) * (conditional - unconditional)
        target = torch.where(like(student.conditioning.is_null(kept), x1), v, guided)
        direction = own(cond, now)

        average, instant, tangent = self._ask(student, engine, x_t, Guided(kept, scale, low, high), t, end, direction)
        compound = average - like(end - t, x1) * tangent
        terms = {"shortcut": self.weight.term(compound - target, t)}
        losses = {"shortcut": terms["shortcut"].loss.mean()}
        if instant is not None:
            terms["velocity"] = self.weight.term(instant - target, t)
            losses["velocity"] = self.velocity_weight * terms["velocity"].loss.mean()
        return ObjectiveResult(
            loss=torch.stack(list(losses.values())).sum(),
            terms={name: loss.detach() for name, loss in losses.items()},
            diagnostics={"tangent_norm": tangent.flatten(1).norm(dim=1).mean(), **_parts(terms)},
            velocity=v,
            prediction=average.detach(),
            tangent=tangent,
        )

    def _ask(
        self, student: Backbone, engine: TangentEngine, x: Tensor, told: Guided, t: Tensor, end: Tensor,
        direction: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """F with its derivative, and V where the network has it: [B, *] each."""
        along: tuple[Tensor, ...] = (direction.to(x.dtype), torch.ones_like(t))
        if self.interval.end_rate:
            along = (*along, torch.full_like(t, self.interval.end_rate))
        question: Question = self.interval.shortcut(t, end)._replace(along=along)
        both = student.has_velocity_head
        (answer,) = engine(student, x, told._replace(asked="both" if both else "average"), [question])
        assert answer.tangent is not None
        parts = answer.prediction.chunk(2, 1) if both else (answer.prediction,)
        tangent = answer.tangent.chunk(2, 1)[0] if both else answer.tangent  # of V none is used
        average, *instant = (at_least_float32(as_velocity(part, x, student)) for part in parts)
        tangent = without_held(at_least_float32(as_velocity(tangent, x, student)), t, student)
        return average, instant[0] if instant else None, tangent

    def check(self, backbone: Backbone) -> None:
        super().check(backbone)
        if not self.interval.tells_end:
            raise ConfigError(
                f"objective=imf_whole learns averages that end anywhere, which {type(self.interval).__name__} cannot "
                "tell the network: choose objective/interval=span."
            )
        if not backbone.takes_guidance:
            raise ConfigError(
                f"objective=imf_whole tells the network its guidance, and this {type(backbone).__name__} takes none: "
                "choose backbone=imf_dit, or objective=imf."
            )
        if isinstance(backbone.conditioning, NoCondition) or backbone.conditioning.dropout <= 0:
            raise ConfigError(
                "objective=imf_whole guides by the network's null condition, which is never trained here: use data "
                "with classes and backbone.class_dropout_prob=0.1, or choose objective=imf."
            )


class _Velocity:
    """The network's instantaneous velocity, without gradient, under guidance at all times."""

    def __init__(self, student: Backbone, engine: TangentEngine, interval: Interval, x: Tensor, t: Tensor) -> None:
        self.student, self.engine, self.x, self.t = student, engine, x, t
        self.question = interval.shortcut(t, t)

    @torch.no_grad()
    def __call__(self, cond: Any, scale: Tensor) -> Tensor:
        """A condition and scales [B] -> [B, *], in float32 at least."""
        asked: Asked = "velocity" if self.student.has_velocity_head else "average"
        told = Guided(cond, scale, torch.zeros_like(scale), torch.ones_like(scale), asked)
        (answer,) = self.engine(self.student, self.x, told, [self.question])
        return at_least_float32(as_velocity(answer.prediction, self.x, self.student))


def _parts(terms: dict[str, TermResult]) -> dict[str, Tensor]:
    return {f"{name}_{part}": value.mean() for name, term in terms.items() for part, value in term.parts.items()}
