"""Sampling with average velocities between any two times: one step from each time of a grid to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowanchor.interfaces import Backbone, Interval
from flowanchor.jumps.grid_sampler import GridSampler
from flowanchor.jumps.precision import state_dtype


class MeanFlowSampler(GridSampler):
    """N steps `x += (t_{i+1} - t_i) F(x, t_i, r = t_{i+1})`, without fresh noise (MeanFlow, arXiv 2505.13447).

    The interval must tell the network where its average ends (`objective/interval=auxiliary`).

    Args: those of `GridSampler`.
    """

    needs_end = True

    @property
    def label(self) -> str:
        return "meanflow"

    @torch.no_grad()
    def sample(
        self,
        backbone: Backbone,
        noise: Tensor,
        cond: Any,
        interval: Interval,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        dtype = state_dtype(backbone)
        x = noise.double()
        for now, after in zip(self.times[:-1].tolist(), self.times[1:].tolist(), strict=True):
            self.tell(now, x)
            t, end = (torch.full((noise.shape[0],), time, device=noise.device, dtype=dtype) for time in (now, after))
            told = interval.shortcut(t, end)
            x = x + (after - now) * self.guidance.velocity(backbone, x.to(dtype), told, cond, t).double()
        self.tell(1.0, x)
        return x
