"""What the described networks are conditioned on: named tuples of tensors [B, ...] (`flowanchor.conditioning.Text`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskedTokens(NamedTuple):
    """An embedding per token, and which of them are text."""

    tokens: Tensor  # [B, L, D]
    mask: Tensor  # [B, L] (bool)


class PooledTokens(NamedTuple):
    """An embedding per token, and one of the whole text."""

    tokens: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]


class TwoTexts(NamedTuple):
    """The text by two encoders."""

    tokens: Tensor  # [B, L, D]
    mask: Tensor  # [B, L] (bool)
    tokens_2: Tensor  # [B, M, E]
    mask_2: Tensor  # [B, M] (bool)
