"""Time grids of samplers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowanchor.errors import ConfigError

STEPS = 100_000  # more is a mistake, or a file that would have its reader wait
_TOLD = 8  # times that a line names one by one


def check_steps(steps: int) -> int:
    """A number of steps; raises `ConfigError` unless it is one."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise ConfigError(f"sampler.steps={steps} is not a whole number: use for example sampler.steps=2.")
    if steps < 1:
        raise ConfigError(f"sampler.steps={steps} is too few: a sampler needs at least one step (sampler.steps=1).")
    if steps > STEPS:
        raise ConfigError(f"sampler.steps={steps} is too many: use {STEPS:,} at most.")
    return steps


def time_grid(steps: int, timestep_shift: float = 0.0, grid: Sequence[float] | None = None) -> Tensor:
    """Times [steps + 1] from 0 (noise) to 1 (data), float64.

    Uniform, then shifted by `s t / (1 + (s - 1) t)` where `timestep_shift` s is above 0: below 1, more steps lie near
    the noise. Where time runs from data to noise (diffusers' `shift`, for example 5) the same grid has 1 / s (0.2).
    An explicit `grid` lists the times at which the network is asked (increasing, in [0, 1)); 1 is added as its end.
    """
    if grid is not None:
        try:
            asked = [float(t) for t in grid]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"sampler.times={grid} is no list of times: write for example sampler.times=[0,0.5]."
            ) from error
        if not asked or asked[0] < 0 or asked[-1] >= 1 or any(b <= a for a, b in zip(asked, asked[1:], strict=False)):
            raise ConfigError(
                f"sampler.times={asked} must be increasing times in [0, 1), for example [0, 0.5] for two steps."
            )
        return torch.tensor([*asked, 1.0], dtype=torch.float64)
    check_steps(steps)
    check_shift(timestep_shift)
    return shifted(torch.linspace(0, 1, steps + 1, dtype=torch.float64), timestep_shift)


def shifted(times: Tensor, timestep_shift: float) -> Tensor:
    """Times [N] in [0, 1] under a shift s, `s t / (1 + (s - 1) t)`; 0: as they are."""
    return timestep_shift * times / (1 + (timestep_shift - 1) * times) if timestep_shift > 0 else times


def check_shift(timestep_shift: float) -> float:
    """A shift; raises `ConfigError` unless it is one."""
    if not 0 <= timestep_shift < float("inf"):
        raise ConfigError(
            f"sampler.timestep_shift={timestep_shift} is no shift: use 0 for none, or for example 0.2, which puts more "
            "steps near the noise."
        )
    return timestep_shift


def told_times(times: Sequence[float]) -> str:
    """Times in words for a line: each of a few, the ends of many."""
    listed = [f"{time:.4g}" for time in times]
    if len(listed) > _TOLD:
        return f"{len(listed)} times from {listed[0]} to {listed[-1]}"
    return f"times {' '.join(listed)}"
