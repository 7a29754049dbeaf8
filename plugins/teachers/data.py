"""Velocity of the data: training from scratch, without guidance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowanchor.interfaces import Backbone, Interval, VelocityField


class DataVelocity(VelocityField):
    """`v = x1 - x0`, whose mean given `x_t` is the flow's velocity (`teacher=none`)."""

    def forward(self, x: Tensor, t: Tensor, cond: Any, flow: Tensor, student: Backbone, interval: Interval) -> Tensor:
        return flow
