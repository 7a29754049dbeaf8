"""Few-step consistency sampling as a diffusers scheduler (FACM, arXiv 2507.03738).

This file needs torch, numpy and diffusers only: a copy of it lies in the `scheduler/` folder of an exported pipeline.

Time t runs from 0 (noise) to 1 (data); a sample at t is `x = (1 - t) noise + t data`, its noise level is
`sigma = 1 - t`, and the network is asked at the timestep `1000 sigma` and answers noise minus data. A step jumps to
the data, `end = x - sigma * answer`, and returns part of the way with fresh noise:
`x' = (1 - sigma') end + sigma' * eps`. Where a share of the noise is kept that the jump implies, `x + t * answer`,
`eps` is `kept * implied + sqrt(1 - kept^2) * fresh`.

With `flow` it is another sampler: a jump, a return to the first of its two times, midpoint steps of the network's other
branch, which is asked at the timestep `-1000 sigma`, and from the second time a last jump.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

# A jump from a boundary is asked of the network just behind it: the boundary itself is the other one's.
BEHIND = 1e-6


@dataclass
class FlowAnchorSchedulerOutput(BaseOutput):
    """The next state [B, C, F, h, w], float64; after the last step the finished latents."""

    prev_sample: torch.Tensor


class FlowAnchorScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """One network call per step, fresh noise between the steps; the state is kept in float64.

    Noise with a seed is a pure function of the seed, the sample's index and the step, so that a sample does not depend
    on its batch: draw the first noise by `initial_latents`, and the later one follows. Without a seed it is random.

    Args:
        num_train_timesteps: timesteps per noise level of 1.
        timestep_shift: s of `t -> s t / (1 + (s - 1) t)` over uniform times; 0 for none.
        grid: times at which the network is asked instead, increasing, in [0, 1).
        boundaries: times at which jumps end that start before them, for networks that were trained in segments.
        seed: of the fresh noise, until `initial_latents` sets another one.
        kept_noise: share of the noise that a jump implies which the return keeps.
        kept_noise_h: instead, the share of each return by the rule `((1 - t_to) t_from / ((1 - t_from) t_to))^(h^2)`.
        flow: times to return to and to jump from a last time, both under the shift; then `grid` and `boundaries` are
            not for it. An odd number of steps (3 and more) takes midpoint steps to the data.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        timestep_shift: float = 0.0,
        grid: Sequence[float] | None = None,
        boundaries: Sequence[float] = (),
        seed: int | None = None,
        kept_noise: float = 0.0,
        kept_noise_h: float | None = None,
        flow: Sequence[float] | None = None,
    ) -> None:
        self._seed, self._first, self._step = seed, 0, 0
        self._times: list[float] = []
        self._flow: list[tuple[float, float, bool]] = []  # of each midpoint call: start and end of its step, is second
        self._base = torch.empty(0)  # the state at the start of a midpoint step
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)

    def initial_latents(self, shape: Sequence[int], seed: int, first: int = 0) -> torch.Tensor:
        """The noise [B, C, F, h, w] (float32) from which a pass starts: give it to the pipeline as `latents=`.

        Row i is sample `first + i` of this seed, and the fresh noise of the passes that follow is that of these
        samples.
        """
        self._seed, self._first = seed, first
        return self._seeded(shape, seed, draw=0).float()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None, **_: Any) -> None:
        """Choose the number of steps; raises `ValueError` for one that the grid or the boundaries do not allow."""
        settings: Any = self.config
        self._flow = [] if settings.flow is None else self._midpoints(num_inference_steps)
        if settings.flow is not None:
            self._step = 0
            self.timesteps = settings.num_train_timesteps * self._asked().to(device)
            return
        self._times = self._grid(num_inference_steps)
        self.sigmas = 1 - torch.tensor(self._times)
        asked = [now + BEHIND if now in settings.boundaries else now for now in self._times[:-1]]
        self.timesteps = (settings.num_train_timesteps * (1 - torch.tensor(asked))).to(device)
        self._step = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The next step is this one (pipelines call it before their loop)."""
        self._step = begin_index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowAnchorSchedulerOutput | tuple[torch.Tensor]:
        """What the network answered at the step's timestep, and the state that it saw -> the next state.

        Steps follow one another as `set_timesteps` planned them. `generator` serves where there is no seed.
        """
        if self._step >= len(self._times) - 1:
            raise ValueError("All steps are done: call set_timesteps before the next pass.")
        number, x, slope = self._step, sample.double(), -model_output.double()
        now, after = self._times[number], self._times[number + 1]
        if 0 < number <= len(self._flow):
            start, stop, second = self._flow[number - 1]
            if not second:
                self._base = x
            state = self._base + (stop - start) * (slope if second else slope / 2)
        else:
            settings: Any = self.config
            edge = next(edge for edge in (*settings.boundaries, 1.0) if edge > now)
            state = x + (edge - now) * slope
            if after != edge:
                share = after / edge
                spread = math.sqrt((1 - after) ** 2 - (share * (1 - edge)) ** 2)
                state = share * state + spread * self._noise(x - now * slope, now, after, generator)
        self._step += 1
        return FlowAnchorSchedulerOutput(prev_sample=state) if return_dict else (state,)

    def _noise(
        self, implied: torch.Tensor, now: float, after: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """What a return from a jump at `now` adds: fresh noise, and a share of what the jump implies."""
        settings: Any = self.config
        kept, h = settings.kept_noise, settings.kept_noise_h
        if h is not None:
            kept = 1.0 if h == 0 else ((1 - after) * now / ((1 - now) * after)) ** (h * h)
        fresh = self._fresh(implied, generator)
        return kept * implied + math.sqrt(1 - kept**2) * fresh if kept else fresh

    def _midpoints(self, steps: int) -> list[tuple[float, float, bool]]:
        """Plan of `flow`: the calls between the jumps; sets the times of all calls."""
        settings: Any = self.config
        middle, flow_end = settings.flow
        count, stop = ((steps - 1) // 2, 1.0) if steps % 2 else ((steps - 2) // 2, flow_end)
        times = torch.linspace(middle, stop, max(count, 0) + 1, dtype=torch.float64)
        shift = settings.timestep_shift
        ends = (shift * times / (1 + (shift - 1) * times) if shift > 0 else times).tolist()
        calls = [(a, b, second) for a, b in zip(ends, ends[1:], strict=False) for second in (False, True)]
        asked = [0.0, *((a + b) / 2 if second else a for a, b, second in calls)]
        self._times = [*(asked if steps % 2 else [*asked, ends[-1]]), 1.0]
        self.sigmas = 1 - torch.tensor(self._times)
        return calls

    def _asked(self) -> torch.Tensor:
        """Noise levels of all calls, negative for the branch of the midpoint steps."""
        levels = 1 - torch.tensor(self._times[:-1])
        levels[1 : 1 + len(self._flow)] *= -1
        return levels

    def _grid(self, steps: int) -> list[float]:
        """Times [steps + 1] from the first call to 1."""
        settings: Any = self.config
        if settings.grid is not None and steps != len(settings.grid):
            raise ValueError(f"The scheduler has a grid of {len(settings.grid)} times: use that many steps.")
        if settings.grid is not None:
            times = torch.tensor([*settings.grid, 1.0], dtype=torch.float64)
        else:
            shift = settings.timestep_shift
            times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            times = shift * times / (1 + (shift - 1) * times) if shift > 0 else times
        segments = len(settings.boundaries) + 1
        if steps < segments:
            raise ValueError(f"{steps} steps cannot visit the {segments} segments of this network: use {segments}.")
        first = 1
        for number, boundary in enumerate(settings.boundaries):  # the nearest inner point becomes the boundary
            last = steps - (segments - 1 - number)  # the later ones need a point each
            index = first + int((times[first : last + 1] - boundary).abs().argmin())
            times[index] = boundary
            first = index + 1
        if bool((times[1:] <= times[:-1]).any()):
            raise ValueError(f"The times {times.tolist()} do not increase: use more steps.")
        return times.tolist()

    def _fresh(self, like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if self._seed is not None:
            return self._seeded(like.shape, self._seed, draw=self._step + 1).to(like.device)
        where = like.device if generator is None else generator.device
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=where).to(like.device)

    def _seeded(self, shape: Sequence[int], seed: int, draw: int) -> torch.Tensor:
        rows = [
            np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, draw, self._first + index))))
            for index in range(shape[0])
        ]
        return torch.from_numpy(np.stack([row.standard_normal(tuple(shape[1:])) for row in rows]))
