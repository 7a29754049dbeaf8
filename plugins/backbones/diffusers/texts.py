"""What the described networks are conditioned on: named tuples of tensors [B, ...] (`flowanchor.conditioning.Text`)."""

from __future__ import annotations

from flowanchor.text.base import MaskedTokens as MaskedTokens
from flowanchor.text.base import PooledTokens as PooledTokens
from flowanchor.text.base import TwoTexts as TwoTexts
