"""Few-step sampling with a shortcut network: jump to the data, return part of the way with fresh noise, jump again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, Sampler
from flowanchor.sampling.grid import time_grid
from flowanchor.sampling.guidance import Guidance


class ConsistencySampler(Sampler):
    """N jumps `x_end = x + (1 - t_i) F(x, t_i)`, then `x = t_{i+1} x_end + (1 - t_{i+1}) eps` (FACM, arXiv 2507.03738).

    Args:
        steps: number of jumps, one network call each.
        grid: explicit times of the jumps instead of a uniform grid, increasing, in [0, 1).
        timestep_shift: shift of the uniform grid; 0 for none.
        guidance_scale, guidance_low, guidance_high: extra guidance; 1 for students whose guidance is baked in.
    """

    kind = "shortcut"

    def __init__(
        self,
        steps: int = 2,
        grid: Sequence[float] | None = None,
        timestep_shift: float = 0.0,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
    ) -> None:
        self.times = time_grid(steps, timestep_shift, grid)
        self.timestep_shift = timestep_shift
        self.grid = None if grid is None else list(grid)
        self.guidance = Guidance(guidance_scale, guidance_low, guidance_high)

    @property
    def label(self) -> str:
        return "consistency"

    @property
    def nfe(self) -> int:
        return len(self.times) - 1

    @property
    def network_calls(self) -> int:
        """Network calls per sample, guided evaluations counted twice."""
        return _count_calls(self.times[:-1], self.guidance)

    def with_nfe(self, nfe: int) -> ConsistencySampler:
        if nfe < 1:
            raise ConfigError(f"nfe={nfe} is too few: a sampler needs at least one network call (nfe=1).")
        if self.grid is not None and nfe != self.nfe:
            raise ConfigError(
                f"sampler.grid has {self.nfe} times and cannot be sampled with nfe={nfe}: remove the grid or that nfe."
            )
        g = self.guidance
        return ConsistencySampler(nfe, self.grid, self.timestep_shift, g.scale, g.low, g.high)

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


def _count_calls(times: Tensor, guidance: Guidance) -> int:
    inside = (times >= guidance.low) & (times <= guidance.high)
    return int((1 + inside.long() * (guidance.calls - 1)).sum())
