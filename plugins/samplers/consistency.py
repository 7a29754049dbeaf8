"""Few-step sampling with a shortcut network: jump to the data, return part of the way with fresh noise, jump again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval
from flowanchor.jumps.grid_sampler import GridSampler
from flowanchor.jumps.precision import state_dtype
from flowanchor.jumps.segments import BEHIND, back, check_boundaries, check_kept, kept_by_rule, segmented_grid


class ConsistencySampler(GridSampler):
    """N jumps `x_end = x + (1 - t_i) F(x, t_i)`, then `x = t_{i+1} x_end + (1 - t_{i+1}) eps` (FACM, arXiv 2507.03738).

    Args: those of `GridSampler`, and
        boundaries: of the segments that the network was trained with: a jump ends with its segment, and the next
            segment goes on from there. The grid's nearest points are moved onto them.
        kept_noise: share in [0, 1] of the noise that a jump implies, `x - t F`, which the return keeps; 0: fresh noise.
        kept_noise_h: instead of one share, that of each return by the rule of `kept_by_rule`; 0: deterministic.
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
        times: Sequence[float] | None = None,
        kept_noise: float = 0.0,
        kept_noise_h: float | None = None,
    ) -> None:
        super().__init__(steps, grid, timestep_shift, guidance_scale, guidance_low, guidance_high, times)
        self.kept_noise, self.kept_noise_h = check_kept(kept_noise), kept_noise_h
        if kept_noise_h is not None and not (kept_noise_h >= 0 and kept_noise == 0):
            raise ConfigError(
                f"sampler.kept_noise_h={kept_noise_h} must be 0 or more, and stands in the place of sampler.kept_noise "
                f"(which is {kept_noise}): set one of them."
            )
        if boundaries and (kept_noise or kept_noise_h is not None):
            raise ConfigError("sampler.kept_noise needs jumps that end at the data: leave out sampler.boundaries.")
        self.boundaries = check_boundaries(boundaries, "sampler.boundaries")
        self.times = segmented_grid(self.times, self.boundaries, "sampler.steps")

    def settings(self) -> dict[str, Any]:
        kept = {"kept_noise": self.kept_noise, "kept_noise_h": self.kept_noise_h}
        return {**super().settings(), "boundaries": self.boundaries, **kept}

    @property
    def asked(self) -> list[float]:
        """Times at which the network is asked: those of the steps, a boundary's on the side of its later segment."""
        return [now + BEHIND if now in self.boundaries else now for now in self.times[:-1].tolist()]

    @property
    def label(self) -> str:
        return "consistency"

    def told(self) -> str:
        kept = f", {self.kept_noise:g} of the implied noise kept" if self.kept_noise else ""
        kept = kept if self.kept_noise_h is None else f", implied noise kept by h = {self.kept_noise_h:g}"
        ends = f", jumps end at {' '.join(f'{edge:g}' for edge in self.boundaries)} 1" if self.boundaries else ""
        return f"{super().told()}{ends}{kept}"

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
            if after == ends[step]:
                x = end
                continue
            kept = self.kept_noise if self.kept_noise_h is None else kept_by_rule(self.kept_noise_h, now, after)
            x = back(end, ends[step], after, renoise(step).double(), x - now * velocity, kept)
        self.tell(1.0, end)
        return end
