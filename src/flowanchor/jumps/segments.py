"""Segments of the time between noise and data, each with jumps of its own: where one ends, and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowanchor.errors import ConfigError

# A boundary itself belongs to the expert before it, as released (sigma >= 0.875 is high noise). What lies behind it
# keeps this distance: 1 - t and 2 - t then fall on the side of t in float32, too.
BEHIND = 1e-6


def check_boundaries(boundaries: Sequence[float] | None, setting: str) -> tuple[float, ...]:
    """The boundaries as numbers; raises `ConfigError` unless they increase within (0, 1)."""
    try:
        found = tuple(float(value) for value in boundaries or ())
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{setting}={boundaries} is no list of times: write for example {setting}=[0.125]."
        ) from error
    edges = (0.0, *found, 1.0)
    if any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise ConfigError(f"{setting}={list(found)} must be increasing times within (0, 1), for example [0.125].")
    return found


def segment(t: Tensor, boundaries: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Times [B] -> start and end [B] of the segments that they lie in; a boundary starts the later one."""
    start, end = torch.zeros_like(t), torch.ones_like(t)
    for boundary in boundaries:  # no tensor is made of numbers: for that the host would wait
        start = torch.where(t >= boundary, boundary, start)
    for boundary in reversed(boundaries):
        end = torch.where(t < boundary, boundary, end)
    return start, end


def segmented_grid(times: Tensor, boundaries: Sequence[float], setting: str) -> Tensor:
    """A grid of sampling times [N + 1] with its nearest inner points moved onto the boundaries.

    Raises `ConfigError` where it has fewer steps than there are segments.
    """
    times = times.clone()
    if len(boundaries) > len(times) - 2:
        raise ConfigError(
            f"{setting}: {len(times) - 1} steps cannot visit {len(boundaries) + 1} segments, which end at "
            f"{', '.join(map(str, boundaries))} and 1: use at least {len(boundaries) + 1} steps."
        )
    first = 1
    for number, boundary in enumerate(boundaries):
        last = len(times) - 2 - (len(boundaries) - 1 - number)  # the later boundaries need a point each
        index = first + int((times[first : last + 1] - boundary).abs().argmin())
        times[index] = boundary
        first = index + 1
    if bool((times[1:] <= times[:-1]).any()):
        raise ConfigError(f"{setting}: the times {times.tolist()} do not increase: use more steps, or another grid.")
    return times


def back(x: Tensor, end: float, time: float, noise: Tensor, implied: Tensor | None = None, kept: float = 0.0) -> Tensor:
    """A state at `end` with fresh noise added until it is one at the earlier `time` (both of `(1 - t) x0 + t x1`).

    From the data (`end = 1`) a share `kept` of the noise may be what the jump to `x` implies, `implied`: the noise is
    then `kept implied + sqrt(1 - kept^2) noise`, standard normal if `implied` is.
    """
    if kept:
        assert implied is not None and end == 1
        noise = kept * implied + math.sqrt(1 - kept**2) * noise
    share = time / end
    return share * x + math.sqrt((1 - time) ** 2 - (share * (1 - end)) ** 2) * noise


def kept_by_rule(h: float, now: float, time: float) -> float:
    """The share of implied noise that a return from a jump at `now` to `time` keeps, `(s_to a / (s a_to))^(h^2)` with
    `s = 1 - t` and `a = t` of the two times: 1 (deterministic) for h = 0, fresh noise for h to infinity or now = 0."""
    if h == 0:
        return 1.0
    ratio = (1 - time) * now / ((1 - now) * time)
    return float(ratio ** (h * h))


def check_kept(kept: float) -> float:
    """A share of noise to keep; raises `ConfigError` unless it lies in [0, 1]."""
    if not 0 <= kept <= 1:
        raise ConfigError(f"sampler.kept_noise={kept} must be a share between 0 (fresh noise) and 1 (none).")
    return kept
