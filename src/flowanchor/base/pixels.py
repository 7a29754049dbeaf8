"""Pixels as bytes and as numbers: uint8 in [0, 255] <-> float in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (any shape, any float type) -> uint8: `clamp(round((x + 1) * 127.5), 0, 255)`.

    A value that is not a number becomes 0, so that a diverged sample is a black one on every platform.
    """
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return torch.nan_to_num(scaled, nan=0.0).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Images in uint8 (any shape) -> float32 in [-1, 1]; `to_uint8` undoes it exactly."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)
