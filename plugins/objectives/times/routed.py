"""Training times of one expert per batch, so that a step asks one of two networks."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import TimeDistribution
from flowanchor.jumps.segments import BEHIND


class Routed(TimeDistribution):
    """The first sample's time decides on which side of `boundary` the whole batch lies.

    So a side is as frequent as the times are which the other distribution draws there. The samples that lie on the
    other side are mapped linearly into the chosen one. All processes draw the joint batch, so they agree on the side.
    """

    def __init__(self, time: TimeDistribution, boundary: float = 0.125) -> None:
        if not 0 < boundary < 1:
            raise ConfigError(f"objective.time.boundary={boundary} must lie between 0 and 1: Wan 2.2 has 0.125.")
        self.time, self.boundary = time, boundary

    def draw(self, size: int, device: torch.device | str | None = None) -> Tensor:
        return self.time.draw(size, device)

    def from_draw(self, z: Tensor) -> Tensor:
        t, b = self.time.from_draw(z), self.boundary
        early = t[:1] < b
        within = torch.where(early, b * (t - b) / (1 - b), b + (1 - b) * t / b)
        mapped = torch.where((t < b) == early, t, within)
        return torch.where(early, mapped.clamp(0, b - BEHIND), mapped.clamp(b + BEHIND, 1))  # none at b itself
