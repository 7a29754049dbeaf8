"""Samples as tokens and back, in the orders that the described networks read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packed(x: Tensor, side: int = 2) -> Tensor:
    """[B, C, h, w] -> [B, h/side w/side, C side side]: squares of pixels as tokens, channels outermost."""
    b, c, h, w = x.shape
    cut = x.view(b, c, h // side, side, w // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * side * side)


def unpacked(tokens: Tensor, shape: Sequence[int], side: int = 2) -> Tensor:
    """The inverse of `packed`, to [B, C, h, w] = `shape`."""
    b, _, h, w = shape
    cut = tokens.view(b, h // side, w // side, -1, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h, w)


def unpatched(tokens: Tensor, shape: Sequence[int], side: int) -> Tensor:
    """[B, N, side side C], channels innermost -> [B, C, h, w] = `shape`."""
    b, _, h, w = shape
    cut = tokens.view(b, h // side, w // side, side, side, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


def unpatched_video(tokens: Tensor, shape: Sequence[int], patch: tuple[int, int, int]) -> Tensor:
    """[B, N, C pf ph pw], channels outermost -> [B, C, f, h, w] = `shape`."""
    b, _, f, h, w = shape
    cut = tokens.view(b, f // patch[0], h // patch[1], w // patch[2], -1, *patch)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, -1, f, h, w)


def flattened(x: Tensor) -> Tensor:
    """[B, C, *] -> [B, N, C]: a token per position."""
    return x.flatten(2).transpose(1, 2)


def unflattened(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `flattened`, to [B, C, *] = `shape`."""
    return tokens.transpose(1, 2).unflatten(2, tuple(shape[2:]))


def places(rows: int, columns: int, device: torch.device, width: int = 3) -> Tensor:
    """Rotary positions (0, row, column, 0, ...) of an image's tokens, [rows columns, width]."""
    found = torch.zeros(rows, columns, width, device=device)
    found[..., 1] += torch.arange(rows, device=device)[:, None]
    found[..., 2] += torch.arange(columns, device=device)[None]
    return found.view(rows * columns, width)


def unless_whole(mask: Tensor) -> Tensor | None:
    """A mask [B, L], or None where it leaves nothing out: attention without a mask is fused, and takes less memory."""
    return None if bool(mask.all()) else mask
