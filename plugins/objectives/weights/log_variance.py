"""The learned weight of sCM: a log-variance per time, trained with the network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowanchor.interfaces import Reduction, Weight


class LogVarianceWeight(Weight):
    """`e / exp(w(t)) + w(t)`, **per sample** (sCM, arXiv 2410.11081; EDM2, arXiv 2312.02696).

    `w` is a linear layer on random Fourier features of the time, zero at first. Its parameters are the objective's own:
    they are in the optimizer and in the checkpoint, and belong to no network.

    Args:
        features: number of Fourier features.
        bandwidth: standard deviation of their frequencies, in turns per unit of time.
        seed: of the frequencies.
        reduction: `mean` or `sum` of a sample's squared differences. w learns the other away, from another start.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self, features: int = 128, bandwidth: float = 1.0, seed: int = 0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction)
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", 2 * math.pi * bandwidth * torch.randn(features, generator=draw))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=draw))
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def log_variance(self, t: Tensor) -> Tensor:
        """Times [B] -> w [B]."""
        with torch.autocast(t.device.type, enabled=False):
            features = math.sqrt(2) * torch.cos(t[:, None].to(self.frequencies) * self.frequencies + self.phases)
            return self.linear(features).squeeze(1)

    def forward(self, error: Tensor, t: Tensor) -> Tensor:
        w = self.log_variance(t).to(error.dtype)
        return error / w.exp() + w
