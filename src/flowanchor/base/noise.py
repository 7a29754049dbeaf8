"""Noise that belongs to a sample, not to a batch: same seed, same images, whatever the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

DRAWN_AT_ONCE = (
    1 << 16
)  # values of a group of small samples, which share a draw so that a device is not asked too often


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normal noise [len(indices), *shape], float64: row i is a pure function of (seed, indices[i], draw)."""
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, draw, index)))).standard_normal(tuple(shape))
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows))


def renoiser(
    seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str
) -> Callable[[int], Tensor]:
    """Fresh noise after sampling step k (draw k + 1; draw 0 is the initial noise)."""
    return lambda step: sample_noise(seed, indices, shape, draw=step + 1).to(device)


def share_of_noise(
    seeds: Sequence[int], first: int, count: int, shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """Standard normal noise [count, *shape], float32, of the samples `first`, `first + 1`, ... of a joint batch.

    Every sample has the same noise however many processes share the batch, and a process draws no more than its own
    samples and, of small ones, what is left of its first and last group. The device's global state is not touched.

    Args:
        seeds: what the joint batch's noise is a function of.
    """
    group = max(1, DRAWN_AT_ONCE // math.prod(shape))
    drawn: list[Tensor] = []
    generator = torch.Generator(device)
    for index in range(first // group, -(-(first + count) // group)):
        generator.manual_seed(int(np.random.SeedSequence((*seeds, index)).generate_state(1, np.uint64)[0] >> 1))
        rows = torch.randn(group, *shape, device=device, generator=generator)
        drawn.append(rows[max(first - index * group, 0) : first + count - index * group])
    return torch.cat(drawn)
