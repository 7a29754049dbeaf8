"""Jump, return, flow, jump: what a network with both a shortcut and an anchor draws in more than two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, Question, Sampler
from flowanchor.jumps.grid import check_shift, check_steps, shifted, told_times
from flowanchor.jumps.guidance import Guidance
from flowanchor.jumps.precision import state_dtype
from flowanchor.jumps.segments import back, check_kept


class JumpFlowSampler(Sampler):
    """One jump to the data, back to `middle` with fresh noise, midpoint steps of the anchor, a last jump.

    Fresh noise at every step of a grid of jumps cannot undo the bias that each jump has; the anchor's flow has none
    beyond its solver's. With one and two calls it is `ConsistencySampler` on a uniform grid (if `middle` is 0.5): a
    jump, and the jump from `middle`. With 2 + 2n calls, n midpoint steps lie between, from `middle` to `flow_end`,
    where the last jump starts; with 1 + 2n calls (3 and more) the midpoint steps go to the data and there is no last
    jump. The shortcut ends at the data, so networks that were trained with boundaries are not for it.

    Args:
        steps: network evaluations.
        middle: time in (0, 1) to return to.
        flow_end: time in (middle, 1) where the last jump starts.
        kept_noise: share in [0, 1] of the noise that the first jump implies which the return keeps; 0: fresh noise.
        guidance_scale, guidance_low, guidance_high: extra guidance; 1 for networks whose guidance is baked in.
        timestep_shift: s of `t -> s t / (1 + (s - 1) t)`, through which `middle`, `flow_end` and what lies between
            them go, as the grids of other samplers do; 0 for none.
    """

    kind = "shortcut"
    needs_anchor = True

    def __init__(
        self,
        steps: int = 4,
        middle: float = 0.5,
        flow_end: float = 0.9,
        kept_noise: float = 0.0,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        timestep_shift: float = 0.0,
    ) -> None:
        self.steps = check_steps(steps)
        if not 0 < middle < flow_end < 1:
            raise ConfigError(
                f"sampler.middle={middle} and sampler.flow_end={flow_end} must be increasing times within (0, 1), for "
                "example 0.5 and 0.9."
            )
        self.middle, self.flow_end, self.kept_noise = middle, flow_end, check_kept(kept_noise)
        self.timestep_shift = check_shift(timestep_shift)
        self.guidance = Guidance(guidance_scale, guidance_low, guidance_high)

    @property
    def nfe(self) -> int:
        return self.steps

    @property
    def label(self) -> str:
        return "jump-flow"

    @property
    def flow_times(self) -> list[float]:
        """Ends of the midpoint steps, the time of the return first; of one number, there are none."""
        steps, stop = ((self.steps - 1) // 2, 1.0) if self.steps % 2 else ((self.steps - 2) // 2, self.flow_end)
        times = torch.linspace(self.middle, stop, max(steps, 0) + 1, dtype=torch.float64)
        return shifted(times, self.timestep_shift).tolist()

    @property
    def asked(self) -> list[float]:
        """Times at which the network is asked."""
        asked = [0.0]
        for now, after in zip(self.flow_times, self.flow_times[1:], strict=False):
            asked += [now, (now + after) / 2]
        return asked if self.steps % 2 else [*asked, self.flow_times[-1]]

    @property
    def network_calls(self) -> int:
        inside = [self.guidance.low <= time <= self.guidance.high for time in self.asked]
        return self.steps + sum(inside) * (self.guidance.calls - 1)

    def with_nfe(self, nfe: int) -> JumpFlowSampler:
        g = self.guidance
        guidance = (g.scale, g.low, g.high)
        return JumpFlowSampler(nfe, self.middle, self.flow_end, self.kept_noise, *guidance, self.timestep_shift)

    def told(self) -> str:
        kept = f", {self.kept_noise:g} of the implied noise kept" if self.kept_noise else ""
        return f"{self.label}, {told_times(self.asked)}{kept}{self.guidance.told()}"

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

        def velocity(question: Callable[[Tensor], Question], time: float, x: Tensor) -> Tensor:
            t = torch.full((noise.shape[0],), time, device=noise.device, dtype=dtype)
            told = question(t).for_network(backbone)
            return self.guidance.velocity(backbone, x.to(dtype), told, cond, t).double()

        x = noise.double()
        self.tell(0.0, x)
        end = x + velocity(interval.shortcut, 0.0, x)
        if self.steps == 1:
            self.tell(1.0, end)
            return end
        x = back(end, 1.0, self.flow_times[0], renoise(0).double(), implied=x, kept=self.kept_noise)
        for now, after in zip(self.flow_times, self.flow_times[1:], strict=False):
            self.tell(now, x)
            half = x + (after - now) / 2 * velocity(interval.anchor, now, x)
            x = x + (after - now) * velocity(interval.anchor, (now + after) / 2, half)
        if self.steps % 2 == 0:
            self.tell(self.flow_times[-1], x)
            x = x + (1 - self.flow_times[-1]) * velocity(interval.shortcut, self.flow_times[-1], x)
        self.tell(1.0, x)
        return x
