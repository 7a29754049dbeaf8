"""Noise of one seed, or on the way from one seed to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowanchor.base.noise import sample_noise


@dataclass(frozen=True)
class Noise:
    """What pictures are drawn from: picture i has the noise of `(seed, numbers[i])`, whoever draws it.

    Attributes:
        seed: of all pictures.
        numbers: which of the seed's noises each picture has.
        towards: another seed, and how far each picture is on the way to it, in [0, 1]; None: none is.
    """

    seed: int
    numbers: Sequence[int]
    towards: tuple[int, Sequence[float]] | None = None

    def draw(self, start: int, stop: int, shape: Sequence[int], draw: int = 0) -> Tensor:
        """Standard normal noise of pictures start ... stop - 1, [stop - start, *shape], float64.

        `draw`: 0 for the noise that a picture begins with, `k + 1` for what is added after step k.
        """
        numbers = self.numbers[start:stop]
        own = sample_noise(self.seed, numbers, shape, draw)
        if self.towards is None:
            return own
        seed, shares = self.towards
        return spherical(own, sample_noise(seed, numbers, shape, draw), torch.tensor(list(shares[start:stop])))


def spherical(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """From `first` to `second` [B, *] along a great circle, `share` [B] of the way: what is in between has the length
    that noise has, where a straight line passes closer to zero. Exactly `first` at 0 and `second` at 1."""
    a, b = first.flatten(1), second.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    share = share.to(first)
    close = sine < 1e-6  # the same noise twice: a straight line is the circle
    safe = torch.where(close, torch.ones_like(sine), sine)
    left = torch.where(close, 1 - share, ((1 - share) * angle).sin() / safe)
    right = torch.where(close, share, (share * angle).sin() / safe)
    return (left[:, None] * a + right[:, None] * b).reshape(first.shape)
