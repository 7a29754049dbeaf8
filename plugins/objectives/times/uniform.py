"""Uniform training times."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.interfaces import TimeDistribution


class Uniform(TimeDistribution):
    """`t ~ U[0, 1]`; the standard draw is uniform itself (stage 1)."""

    def draw(self, size: int, device: torch.device | str | None = None) -> Tensor:
        return torch.rand(size, device=device)

    def from_draw(self, z: Tensor) -> Tensor:
        return z
