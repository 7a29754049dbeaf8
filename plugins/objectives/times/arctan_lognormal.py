"""FACM's default training times: a log-normal noise level mapped to an angle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowanchor.interfaces import TimeDistribution


class ArctanLogNormal(TimeDistribution):
    """`t = 1 - (2 / pi) atan(exp(std z - mean))`, `z ~ N(0, 1)` (FACM, arXiv 2507.03738; sCM's law, other time)."""

    def __init__(self, mean: float = 0.8, std: float = 1.6) -> None:
        self.mean = mean
        self.std = std

    def from_draw(self, z: Tensor) -> Tensor:
        return 1 - (2 / math.pi) * torch.atan(torch.exp(self.std * z - self.mean))
