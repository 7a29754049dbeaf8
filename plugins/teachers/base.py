"""The base teaches its own adapters: the student without them, one copy of the weights in memory (`teacher=base`)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, Question, VelocityField
from flowanchor.jumps.guidance import Guidance


class BaseVelocity(VelocityField):
    """`v_u + scale (v_c - v_u)` of the student without its adapters for `low <= t <= high`, `v_c` outside.

    It is asked through the student's own stages, and so in its sharding units.

    Args:
        ask: how the base is told the time: `plain` (`t`: a flow model, or stage 1 of FACM), or `anchor` (at the anchor
            of the run's interval: a base that was itself distilled under it).
    """

    is_network = True

    def __init__(
        self,
        guidance_scale: float = 1.75,
        guidance_low: float = 0.125,
        guidance_high: float = 1.0,
        ask: str = "plain",
    ) -> None:
        super().__init__()
        if ask not in ("plain", "anchor"):
            raise ConfigError(f"teacher.ask={ask} is unknown: choose plain or anchor.")
        self.ask = ask
        self.guidance = Guidance(guidance_scale, guidance_low, guidance_high)
        self._reached: bool | None = None  # whether guidance reaches a time of the batch, once the host was told them

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, cond: Any, flow: Tensor, student: Backbone, interval: Interval) -> Tensor:
        question = interval.anchor(t) if self.ask == "anchor" else Question(t)
        with student.without_adapters():
            told = question.for_network(student)
            return self.guidance.velocity(student, x, told, cond, t, self._reached).to(flow.dtype)

    def clips(self, student: Backbone) -> bool:
        return student.predicts == "x"

    def at_times(self, t: Tensor | None) -> Hashable:
        self._reached = None if t is None or self.guidance.scale == 1 else self.guidance.reaches(t)
        return self._reached

    def check(self, student: Backbone) -> None:
        """Raise `ConfigError` for a student that is trained whole: without adapters it would be nobody else."""
        if not student.borrowed():
            raise ConfigError(
                "teacher=base asks the student without its adapters, and this one has none: add backbone.lora.rank=16, "
                "or choose teacher=checkpoint."
            )
