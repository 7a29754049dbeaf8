"""Noise that belongs to a sample, not to a batch: same seed, same images, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


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
