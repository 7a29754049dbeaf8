"""Training times shifted towards the noise or the data, as flow models of large images want them."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import TimeDistribution


class Shifted(TimeDistribution):
    """`s t / (1 + (s - 1) t)` of another distribution's `t`; `s` below 1 moves times towards the noise.

    A shift S of noise levels, `S sigma / (1 + (S - 1) sigma)` as Wan's schedulers have it, is `s = 1 / S` here.
    """

    def __init__(self, time: TimeDistribution, shift: float) -> None:
        if not shift > 0:
            raise ConfigError(f"objective.time.shift={shift} must be above 0: 1 shifts nothing, 0.2 towards the noise.")
        self.time, self.shift = time, shift

    def draw(self, size: int, device: torch.device | str | None = None) -> Tensor:
        return self.time.draw(size, device)

    def from_draw(self, z: Tensor) -> Tensor:
        t = self.time.from_draw(z)
        return self.shift * t / (1 + (self.shift - 1) * t)
