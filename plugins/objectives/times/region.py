"""Training times of one region: what an expert for some noise levels is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import TimeDistribution
from flowanchor.jumps.segments import BEHIND


class Region(TimeDistribution):
    """Another distribution squeezed into [low, high]: `low + (high - low) t`, none at an end within (0, 1) itself."""

    def __init__(self, time: TimeDistribution, low: float, high: float) -> None:
        if not 0 <= low < low + 4 * BEHIND < high <= 1:
            raise ConfigError(f"The region of times [{low}, {high}] must lie within [0, 1] and not be empty.")
        self.time, self.low, self.high = time, low, high

    def draw(self, size: int, device: torch.device | str | None = None) -> Tensor:
        return self.time.draw(size, device)

    def from_draw(self, z: Tensor) -> Tensor:
        squeezed = self.low + (self.high - self.low) * self.time.from_draw(z)
        return squeezed.clamp(
            self.low + BEHIND if self.low > 0 else 0.0,
            self.high - BEHIND if self.high < 1 else 1.0,
        )
