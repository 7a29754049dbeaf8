"""Two frozen experts teach, each its own noise levels with its own guidance, as in Wan 2.2."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.graphs.capture import capturing
from flowanchor.interfaces import Backbone, Interval, VelocityField
from flowanchor.jvp.stages import is_sharded
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity


class ExpertsVelocity(VelocityField):
    """The high-noise expert's guided velocity where `1 - t >= boundary`, the low-noise one's elsewhere.

    Args:
        high, low: checkpoints, or folders with the released weights.
        boundary: noise level at which the low-noise expert takes over.
        guidance_scale_high, guidance_scale_low: 4.0 and 3.0 as released.
        guidance_low, guidance_high: times t between which guidance is on.
        one_side: every batch lies on one side (`objective/time=routed` or `region`), so that a sharded pair need not
            be asked twice; `ConfigError` where a batch does not.
        dtype, precision: as for `CheckpointVelocity`.
    """

    weights_from = ("high", "low")
    is_network = True

    def __init__(
        self,
        high: str,
        low: str,
        boundary: float = 0.875,
        guidance_scale_high: float = 4.0,
        guidance_scale_low: float = 3.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        one_side: bool = False,
        dtype: str = "float32",
        precision: str | int | None = None,
    ) -> None:
        super().__init__()
        if not high or not low:
            raise ConfigError("Two experts teach: add teacher.high=PATH and teacher.low=PATH (docs/wan.md).")
        self.boundary, self.one_side = boundary, one_side
        self._sides: tuple[bool, bool] | None = None  # of the batch, once the host was told its times
        scales = ((high, guidance_scale_high), (low, guidance_scale_low))
        common: Any = {"guidance_low": guidance_low, "guidance_high": guidance_high}
        common |= {"dtype": dtype, "precision": precision}
        self.high, self.low = (CheckpointVelocity(path, scale, **common) for path, scale in scales)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, cond: Any, flow: Tensor, student: Backbone, interval: Interval) -> Tensor:
        early = 1 - t >= self.boundary
        high, low = self.high, self.low
        some, every = self.sides(t) if self._sides is None else self._sides
        mixed = some and not every
        if mixed and self.one_side:
            raise ConfigError(
                "teacher.one_side=true, and a batch has times of both experts: use objective/time=routed."
            )
        if self.one_side or not (mixed or is_sharded(high)):
            expert = high if some else low
            return cast(Tensor, expert(x, t, cond, flow, student, interval))
        # The processes of a sharded pair must ask alike, whatever their times are; a graph asks alike at each replay.
        if is_sharded(high) or capturing():
            first, second = (expert(x, t, cond, flow, student, interval) for expert in (high, low))
            return torch.where(like(early, x), first, second)
        out = torch.empty_like(flow)
        for expert, mine in ((high, early), (low, ~early)):
            inputs = tree_map(lambda part, rows=mine: part[rows], (x, t, cond, flow))
            out[mine] = expert(*inputs, student, interval)
        return out

    def sides(self, t: Tensor) -> tuple[bool, bool]:
        """Whether some of the times [B], and whether all of them, belong to the high-noise expert."""
        early = 1 - t >= self.boundary
        return bool(early.any()), bool(early.all())

    def at_times(self, t: Tensor | None) -> Hashable:
        self._sides = None if t is None else self.sides(t)
        return self._sides, self.high.at_times(t), self.low.at_times(t)

    def clips(self, student: Backbone) -> bool:
        return self.high.clips(student)

    def check(self, student: Backbone) -> None:
        if self.high.clips(student) != self.low.clips(student):
            raise ConfigError(
                "One of the experts predicts the data (backbone.predicts=x), the other does not: teach by two alike."
            )
        for expert in (self.high, self.low):
            expert.check(student)
