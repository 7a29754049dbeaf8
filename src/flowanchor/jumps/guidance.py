"""Classifier-free guidance inside an interval of time (arXiv 2207.12598, 2404.07724)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.broadcast import like
from flowanchor.base.shards import is_sharded
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Guided, Question
from flowanchor.velocity import as_velocity


@dataclass(frozen=True)
class Guidance:
    """`v_u + scale (v_c - v_u)` where `low <= t <= high`, conditional velocity elsewhere; scale 1 costs one call.

    A network that takes guidance as an input is told it, and costs one call at every scale.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ConfigError(
                f"The guidance interval [{self.low}, {self.high}] is empty: guidance_low must not exceed guidance_high."
            )

    @property
    def calls(self) -> int:
        """Network calls of one velocity evaluation inside the interval."""
        return 1 if self.scale == 1 else 2

    def told(self) -> str:
        """In words for the end of a line; empty where it does nothing."""
        if self.scale == 1:
            return ""
        where = "" if (self.low, self.high) == (0, 1) else f" for t in [{self.low:g}, {self.high:g}]"
        return f", guidance {self.scale:g}{where}"

    def reaches(self, t: Tensor) -> bool:
        """Whether any of the times [B] lies in the interval; asked of times on a device, the host waits for it."""
        return bool(((t >= self.low) & (t <= self.high)).any())

    def velocity(
        self, network: Backbone, x: Tensor, told: Question, cond: Any, t: Tensor, reached: bool | None = None
    ) -> Tensor:
        """x [B, *], the times that the network is told, condition, t [B] -> guided velocity [B, *].

        `reached`: what `reaches(t)` says, where the caller knows it already.

        A sharded network is called once, whatever the times are, with both conditions side by side in a batch: its
        processes must call it equally often, and each call gathers all of its weights.
        """
        if self.scale == 1:
            return _asked(network, x, told, cond)
        if cond is None:
            raise ConfigError(
                f"A guidance scale of {self.scale} needs labels, and there are none: set teacher.guidance_scale=1 in "
                "training, or sampler.guidance_scale=1 in sampling."
            )
        if network.takes_guidance:
            if self.scale <= 0:
                raise ConfigError(
                    f"This {type(network).__name__} takes guidance scales above 0, and {self.scale} is none: set "
                    "sampler.guidance_scale=1 for no guidance."
                )
            return _asked(network, x, told, Guided.alike(cond, told.t, self.scale, self.low, self.high))
        inside = (t >= self.low) & (t <= self.high)
        null = network.conditioning.null(cond)
        if is_sharded(network):
            conditional, unconditional = _side_by_side(network, x, told, cond, null)
        else:
            conditional = _asked(network, x, told, cond)
            if not (self.reaches(t) if reached is None else reached):
                return conditional
            unconditional = _asked(network, x, told, null)
        guided = unconditional + self.scale * (conditional - unconditional)
        return torch.where(like(inside, x), guided, conditional)


def _side_by_side(network: Backbone, x: Tensor, told: Question, cond: Any, null: Any) -> tuple[Tensor, Tensor]:
    """The network under two conditions in one call."""
    both = network.conditioning.stack(cond, null)
    twice = Question(torch.cat([told.t, told.t]), None if told.r is None else torch.cat([told.r, told.r]))
    first, second = _asked(network, torch.cat([x, x]), twice, both).chunk(2)
    return first, second


def _asked(network: Backbone, x: Tensor, told: Question, cond: Any) -> Tensor:
    return as_velocity(network.predict(x, told.t, cond, told.r), x, network)
