"""Few-step sampling with a shortcut network: jump to the data, return part of the way with fresh noise, jump again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowanchor.interfaces import Backbone, Interval
from flowanchor.sampling.grid_sampler import GridSampler


class ConsistencySampler(GridSampler):
    """N jumps `x_end = x + (1 - t_i) F(x, t_i)`, then `x = t_{i+1} x_end + (1 - t_{i+1}) eps` (FACM, arXiv 2507.03738).

    Args: those of `GridSampler`.
    """

    @property
    def label(self) -> str:
        return "consistency"

    @torch.no_grad()
    def sample(
        self,
        backbone: Backbone,
        noise: Tensor,
        cond: Any,
        interval: Interval,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        renoise = renoise or (lambda step: torch.randn(noise.shape, dtype=torch.float64, device=noise.device))
        dtype = next(backbone.parameters()).dtype
        x = noise.double()
        end = x
        for step, (now, after) in enumerate(zip(self.times[:-1].tolist(), self.times[1:].tolist(), strict=True)):
            t = torch.full((noise.shape[0],), now, device=noise.device, dtype=dtype)
            velocity = self.guidance.velocity(backbone, x.to(dtype), interval.shortcut(t), cond, t).double()
            end = x + (1 - now) * velocity
            if after < 1:
                x = after * end + (1 - after) * renoise(step).double()
        return end
