"""Few-step sampling with a shortcut network: jump to the data, return part of the way with fresh noise, jump again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.interfaces import Backbone, Interval
from flowanchor.jumps.grid_sampler import GridSampler
from flowanchor.jumps.precision import state_dtype
from flowanchor.jumps.segments import BEHIND, back, check_boundaries, segmented_grid


class ConsistencySampler(GridSampler):
    """N jumps `x_end = x + (1 - t_i) F(x, t_i)`, then `x = t_{i+1} x_end + (1 - t_{i+1}) eps` (FACM, arXiv 2507.03738).

    Args: those of `GridSampler`, and
        boundaries: of the segments that the network was trained with: a jump ends with its segment, and the next
            segment goes on from there. The grid's nearest points are moved onto them.
    """

    def __init__(
        self,
        steps: int = 2,
        grid: Sequence[float] | None = None,
        timestep_shift: float = 0.0,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        boundaries: Sequence[float] = (),
    ) -> None:
        super().__init__(steps, grid, timestep_shift, guidance_scale, guidance_low, guidance_high)
        self.boundaries = check_boundaries(boundaries, "sampler.boundaries")
        self.times = segmented_grid(self.times, self.boundaries, "sampler.steps")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "boundaries": self.boundaries}

    @property
    def asked(self) -> list[float]:
        """Times at which the network is asked: those of the steps, a boundary's on the side of its later segment."""
        return [now + BEHIND if now in self.boundaries else now for now in self.times[:-1].tolist()]

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
        dtype = state_dtype(backbone)
        x = noise.double()
        end = x
        ends = [next(edge for edge in (*self.boundaries, 1.0) if edge > now) for now in self.times[:-1].tolist()]
        for step, (now, after) in enumerate(zip(self.times[:-1].tolist(), self.times[1:].tolist(), strict=True)):
            self.tell(now, x)
            t = torch.full((noise.shape[0],), self.asked[step], device=noise.device, dtype=dtype)
            velocity = self.guidance.velocity(backbone, x.to(dtype), interval.shortcut(t), cond, t).double()
            end = x + (ends[step] - now) * velocity
            x = end if after == ends[step] else back(end, ends[step], after, renoise(step).double())
        self.tell(1.0, end)
        return end
