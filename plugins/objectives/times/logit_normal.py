"""Logit-normal training times."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.interfaces import TimeDistribution


class LogitNormal(TimeDistribution):
    """`t = 1 - sigmoid(std z - mean)`, `z ~ N(0, 1)` (FACM's "log" alternative)."""

    def __init__(self, mean: float = 0.8, std: float = 1.6) -> None:
        self.mean = mean
        self.std = std

    def from_draw(self, z: Tensor) -> Tensor:
        return 1 - torch.sigmoid(self.std * z - self.mean)
