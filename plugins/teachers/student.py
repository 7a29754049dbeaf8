"""Guidance without a teacher: the student's own anchor branch gives the unconditional velocity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowanchor.base.broadcast import like
from flowanchor.conditioning import NoCondition
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, VelocityField
from flowanchor.jumps.guidance import Guidance
from flowanchor.velocity import as_velocity, reached


class SelfVelocity(VelocityField):
    """`teacher=self`: `v_u + scale (v_c - v_u)`, `v_c = x1 - x0`, `v_u` from the student's anchor.

    With `mix` kappa the student's own conditional velocity takes a part of it, as in MeanFlow (arXiv 2505.13447):
    `scale v_c + kappa u_c + (1 - scale - kappa) v_u`.

    Guided for `low <= t <= high` only, `x1 - x0` elsewhere.

    The null class must be trained: label dropout is on, and a sample whose label was dropped keeps `x1 - x0` as its
    target, so that the null class learns the unguided velocity.
    """

    def __init__(
        self,
        guidance_scale: float = 1.75,
        guidance_low: float = 0.125,
        guidance_high: float = 1.0,
        mix: float = 0.0,
    ) -> None:
        super().__init__()
        self.mix = mix
        Guidance(guidance_scale, guidance_low, guidance_high)  # refuses an empty interval
        self.guidance_scale = guidance_scale
        self.guidance_low = guidance_low
        self.guidance_high = guidance_high

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, cond: Any, flow: Tensor, student: Backbone, interval: Interval) -> Tensor:
        if self.clips(student):  # what such a network can answer, as its own answers below are
            flow = like(reached(t), flow) * flow
        if self.guidance_scale == 1 and not self.mix:
            return flow
        if cond is None:
            raise ConfigError("teacher=self guides by labels, and the data has none: choose teacher=none.")
        null = student.conditioning.null(cond)
        question = interval.anchor(t)

        def ask(cond: Any) -> Tensor:
            return as_velocity(student.predict(x, question.t, cond, question.r), x, student).to(flow.dtype)

        unconditional = ask(null)
        guided = unconditional + self.guidance_scale * (flow - unconditional)
        if self.mix:
            guided = guided + self.mix * (ask(cond) - unconditional)
        dropped = student.conditioning.is_null(cond)
        inside = (t >= self.guidance_low) & (t <= self.guidance_high) & ~dropped
        return torch.where(like(inside, flow), guided, flow)

    def clips(self, student: Backbone) -> bool:
        return student.predicts == "x"

    def check(self, student: Backbone) -> None:
        """Raise `ConfigError` where the student's null class is never trained."""
        if self.guidance_scale == 1 and not self.mix:
            return
        if isinstance(student.conditioning, NoCondition):
            raise ConfigError("teacher=self guides by labels, and the data has none: choose teacher=none.")
        if student.conditioning.dropout <= 0:
            raise ConfigError(
                "teacher=self takes the unconditional velocity from the student's null class, which is never trained "
                "here: set backbone.disable_label_dropout=false and backbone.class_dropout_prob=0.1 "
                "(or teacher.guidance_scale=1)."
            )
