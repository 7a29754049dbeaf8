"""Guidance as an input of the network, instead of a second call with a null condition (iMF, arXiv 2512.02012)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Asked = Literal["average", "velocity", "both"]


class Guided(NamedTuple):
    """A condition with the guidance that the network is to give by itself, for `Backbone.takes_guidance`.

    It takes the place of the condition on the way to the network, so engines and sharding carry it as one: none of it
    has a tangent. Guidance is that of `v_u + scale (v_c - v_u)` where `low <= t <= high`, and none elsewhere.
    """

    cond: Any
    scale: Tensor  # [B], at least 1; 1: no guidance
    low: Tensor  # [B], in our time
    high: Tensor  # [B]
    asked: Asked = "average"  # of `has_velocity_head`: F, V, or both side by side in the channels [B, 2 C, *]

    @classmethod
    def alike(cls, cond: Any, t: Tensor, scale: float = 1.0, low: float = 0.0, high: float = 1.0) -> Guided:
        """The same guidance for all samples, as many as there are times t [B], in their type."""
        return cls(cond, torch.full_like(t, scale), torch.full_like(t, low), torch.full_like(t, high))

    @classmethod
    def of(cls, cond: Any, t: Tensor) -> Guided:
        """A condition with its guidance; one that comes without any is not guided."""
        return cond if isinstance(cond, Guided) else cls.alike(cond, t)
