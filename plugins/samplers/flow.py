"""Sampling along the flow: integrate the anchor's instantaneous velocity from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, Sampler
from flowanchor.jumps.grid import shifted, time_grid, told_times
from flowanchor.jumps.guidance import Guidance
from flowanchor.jumps.precision import state_dtype

# Velocity evaluations per step of torchdiffeq's fixed-grid solvers; every other solver there is adaptive.
FIXED_SOLVERS = {"midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
TOLERANCE = 1e-12  # of adaptive solvers, which never arrive with less
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


class FlowSampler(Sampler):
    """Solves `dx/dt = v(x, t)` from t = 0 to 1, feeding the network the anchor's condition (`2 - t` when expanded).

    Args:
        steps: steps of the time grid (adaptive solvers choose their own and ignore it).
        solver: `euler`, `heun` (second order, its last step is Euler's: 2 steps - 1 evaluations), or one of
            torchdiffeq's `midpoint heun2 heun3 rk4` on the grid and `dopri5 dopri8 bosh3 fehlberg2
            adaptive_heun` (adaptive).
        guidance_scale, guidance_low, guidance_high: classifier-free guidance for low <= t <= high; scale 1 for none.
        timestep_shift: shift of the grid, `s t / (1 + (s - 1) t)`; 0 for none.
        times: explicit starts of the steps instead of a uniform grid, increasing, in [0, 1).
        rtol, atol: tolerances of adaptive solvers.
        final_euler: the last step of `midpoint` is one of Euler's, with one evaluation: that is how an odd number is
            spent (one alone is Euler's method). Its step has the length of one evaluation, half of the others'.
    """

    kind = "flow"

    def __init__(
        self,
        steps: int = 50,
        solver: str = "euler",
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        timestep_shift: float = 0.0,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        times: Sequence[float] | None = None,
        final_euler: bool = False,
    ) -> None:
        known = ("euler", "heun", *FIXED_SOLVERS, *ADAPTIVE_SOLVERS)
        if solver not in known:
            raise ConfigError(f"Unknown solver sampler.solver={solver}: choose one of {', '.join(known)}.")
        if not (rtol >= TOLERANCE and atol >= TOLERANCE):
            raise ConfigError(f"sampler.rtol={rtol} and sampler.atol={atol} must be {TOLERANCE} at least.")
        if final_euler and solver != "midpoint":
            raise ConfigError(f"sampler.final_euler=true is for sampler.solver=midpoint, and this is {solver}.")
        self.times = time_grid(steps, timestep_shift, times)
        self.final_euler = final_euler
        if final_euler and times is None:
            even = torch.arange(0, 2 * steps, 2, dtype=torch.float64) / (2 * steps - 1)
            self.times = shifted(torch.cat([even, torch.ones(1, dtype=torch.float64)]), timestep_shift)
        self.explicit = None if times is None else list(times)
        self.steps = len(self.times) - 1
        self.solver = solver
        self.guidance = Guidance(guidance_scale, guidance_low, guidance_high)
        self.timestep_shift = timestep_shift
        self.rtol = rtol
        self.atol = atol

    @property
    def label(self) -> str:
        return f"flow-{self.solver}"

    @property
    def nfe(self) -> int | None:
        if self.solver in ADAPTIVE_SOLVERS:
            return None
        if self.solver == "heun":
            return 2 * self.steps - 1
        return self.steps * FIXED_SOLVERS.get(self.solver, 1) - self.final_euler

    @property
    def network_calls(self) -> int | None:
        """Network calls per sample, guided evaluations counted twice; None where it depends on the sample."""
        if self.guidance.scale == 1:
            return self.nfe
        asked = self.asked
        if asked is None:
            return None
        return sum(1 + (self.guidance.low <= time <= self.guidance.high) for time in asked)

    @property
    def asked(self) -> list[float] | None:
        """Times at which the network is asked, not in order; None where the library's solver knows them."""
        starts = self.times[:-1]
        if self.solver == "midpoint":
            middles = (starts + self.times[1:]) / 2
            return torch.cat([starts, middles[: self.steps - self.final_euler]]).tolist()
        if self.solver == "heun":
            return torch.cat([starts, starts[1:]]).tolist()
        return starts.tolist() if self.solver == "euler" else None

    def told(self) -> str:
        where = "adaptive" if self.solver in ADAPTIVE_SOLVERS else told_times(self.times[:-1].tolist())
        return f"{self.label}, {where}{', the last step Euler' if self.final_euler else ''}{self.guidance.told()}"

    def with_nfe(self, nfe: int) -> FlowSampler:
        if nfe < 1:
            raise ConfigError(f"nfe={nfe} is too few: a sampler needs at least one network call (nfe=1).")
        if self.solver in ADAPTIVE_SOLVERS:
            raise ConfigError(
                f"The solver {self.solver} chooses its own steps, so nfe={nfe} cannot be set: use sampler.solver=euler."
            )
        g = self.guidance
        last = self.solver == "midpoint" and nfe % 2 == 1
        steps, spare = (
            ((nfe + 1) // 2, (nfe + 1) % 2)
            if self.solver == "heun"
            else divmod(nfe + last, FIXED_SOLVERS.get(self.solver, 1))
        )
        if spare or steps < 1:
            rule = "2 steps - 1" if self.solver == "heun" else f"a multiple of {FIXED_SOLVERS[self.solver]}"
            raise ConfigError(
                f"The solver {self.solver} spends {rule} evaluations, which nfe={nfe} is not: choose another nfe."
            )
        if self.explicit is not None and steps != self.steps:
            raise ConfigError(
                f"sampler.times has {self.steps} steps and cannot be sampled with nfe={nfe}: remove the times (those "
                f"of a checkpoint: add sampler.steps={steps}) or that nfe."
            )
        guidance = (g.scale, g.low, g.high)
        return FlowSampler(
            steps, self.solver, *guidance, self.timestep_shift, self.rtol, self.atol, self.explicit, last
        )

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

        def velocity(time: float, x: Tensor) -> Tensor:
            t = torch.full((noise.shape[0],), time, device=noise.device, dtype=torch.float64)
            told = interval.anchor(t)
            told = told._replace(t=told.t.to(dtype), r=None if told.r is None else told.r.to(dtype))
            return self.guidance.velocity(backbone, x.to(dtype), told.for_network(backbone), cond, t).double()

        x = noise.double()
        if self.solver not in ("euler", "heun"):
            return self._library_solve(velocity, x)
        times = self.times.tolist()
        for step, (now, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
            self.tell(now, x)
            slope = velocity(now, x)
            if self.solver == "heun" and step < self.steps - 1:
                slope = (slope + velocity(after, x + (after - now) * slope)) / 2
            x = x + (after - now) * slope
        self.tell(1.0, x)
        return x

    def _library_solve(self, velocity: Callable[[float, Tensor], Tensor], x: Tensor) -> Tensor:
        times = (self.times[:-1] if self.final_euler else self.times).to(x.device)
        options = {}
        if self.solver in ADAPTIVE_SOLVERS:
            times = times[[0, -1]]
            # A last step beyond t = 1 would ask the network on the other side of the data end: stop exactly there.
            options = {"step_t": times[-1:]}
        solve = torchdiffeq.odeint
        path = x[None]
        if len(times) > 1:
            path = solve(
                lambda t, x: velocity(float(t), x),
                x,
                times,
                rtol=self.rtol,
                atol=self.atol,
                method=self.solver,
                options=options,
            )
        for now, state in zip(times.tolist(), path, strict=True):
            self.tell(now, state)
        if not self.final_euler:
            return path[-1]
        now = float(times[-1])
        x = path[-1] + (1 - now) * velocity(now, path[-1])
        self.tell(1.0, x)
        return x
