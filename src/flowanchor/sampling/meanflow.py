"""Sampling with average velocities between any two times: one step from each time of a grid to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, Sampler
from flowanchor.sampling.grid import time_grid
from flowanchor.sampling.guidance import Guidance


class MeanFlowSampler(Sampler):
    """N steps `x += (t_{i+1} - t_i) F(x, t_i, r = t_{i+1})`, without fresh noise (MeanFlow, arXiv 2505.13447).

    The interval must tell the network where its average ends (`objective/interval=auxiliary`).

    Args:
        steps: number of steps, one network call each.
        grid: explicit times of the steps instead of a uniform grid, increasing, in [0, 1).
        timestep_shift: shift of the uniform grid; 0 for none.
        guidance_scale, guidance_low, guidance_high: extra guidance; 1 for networks whose guidance is baked in.
    """

    kind = "shortcut"
    needs_end = True

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
        return "meanflow"

    @property
    def nfe(self) -> int:
        return len(self.times) - 1

    @property
    def network_calls(self) -> int:
        """Network calls per sample, guided evaluations counted twice."""
        asked = self.times[:-1]
        inside = (asked >= self.guidance.low) & (asked <= self.guidance.high)
        return int((1 + inside.long() * (self.guidance.calls - 1)).sum())

    def with_nfe(self, nfe: int) -> MeanFlowSampler:
        if nfe < 1:
            raise ConfigError(f"nfe={nfe} is too few: a sampler needs at least one network call (nfe=1).")
        if self.grid is not None and nfe != self.nfe:
            raise ConfigError(
                f"sampler.grid has {self.nfe} times and cannot be sampled with nfe={nfe}: remove the grid or that nfe."
            )
        g = self.guidance
        return MeanFlowSampler(nfe, self.grid, self.timestep_shift, g.scale, g.low, g.high)

    @torch.no_grad()
    def sample(
        self,
        backbone: Backbone,
        noise: Tensor,
        cond: Any,
        interval: Interval,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        dtype = next(backbone.parameters()).dtype
        x = noise.double()
        for now, after in zip(self.times[:-1].tolist(), self.times[1:].tolist(), strict=True):
            t, end = (torch.full((noise.shape[0],), time, device=noise.device, dtype=dtype) for time in (now, after))
            told = interval.shortcut(t, end)
            x = x + (after - now) * self.guidance.velocity(backbone, x.to(dtype), told, cond, t).double()
        return x
