"""What samplers share that ask a shortcut network once at each time of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Sampler
from flowanchor.jumps.grid import time_grid, told_times
from flowanchor.jumps.guidance import Guidance

Self = TypeVar("Self", bound="GridSampler")


class GridSampler(Sampler):
    """Steps along a grid of times, one network call each; a subclass says what a step does.

    Args:
        steps: number of steps.
        times: explicit times of the steps instead of a uniform grid, increasing, in [0, 1).
        grid: an older name of `times`.
        timestep_shift: shift of the uniform grid; 0 for none.
        guidance_scale, guidance_low, guidance_high: extra guidance; 1 for networks whose guidance is baked in.
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
        times: Sequence[float] | None = None,
    ) -> None:
        if grid is not None and times is not None:
            raise ConfigError("sampler.grid is an older name of sampler.times: set one of them.")
        grid = times if grid is None else grid
        self.times = time_grid(steps, timestep_shift, grid)
        self.timestep_shift = timestep_shift
        self.grid = None if grid is None else list(grid)
        self.guidance = Guidance(guidance_scale, guidance_low, guidance_high)

    @property
    def nfe(self) -> int:
        return len(self.times) - 1

    @property
    def network_calls(self) -> int:
        """Network calls per sample, guided evaluations counted twice."""
        asked = self.times[:-1]
        inside = (asked >= self.guidance.low) & (asked <= self.guidance.high)
        return int((1 + inside.long() * (self.guidance.calls - 1)).sum())

    def with_nfe(self: Self, nfe: int) -> Self:
        if nfe < 1:
            raise ConfigError(f"nfe={nfe} is too few: a sampler needs at least one network call (nfe=1).")
        if self.grid is not None and nfe != self.nfe:
            raise ConfigError(
                f"sampler.times has {self.nfe} times and cannot be sampled with nfe={nfe}: remove the times (those of "
                f"a checkpoint: add sampler.steps={nfe}) or that nfe."
            )
        return type(self)(**{**self.settings(), "steps": nfe})

    def told(self) -> str:
        return f"{self.label}, {told_times(self.times[:-1].tolist())}{self.guidance.told()}"

    def settings(self) -> dict[str, Any]:
        """What it was made with, but for the number of steps."""
        g = self.guidance
        return {
            "grid": self.grid,
            "timestep_shift": self.timestep_shift,
            "guidance_scale": g.scale,
            "guidance_low": g.low,
            "guidance_high": g.high,
        }
