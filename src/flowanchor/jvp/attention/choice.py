"""Choosing an attention tangent by name, or by what it is asked."""

from __future__ import annotations

from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.jvp.attention.base import AttentionTangent
from flowanchor.jvp.attention.math import Math
from flowanchor.jvp.attention.streaming import Streaming
from flowanchor.jvp.attention.tiles import CACHE
from flowanchor.jvp.attention.triton import Triton

FEW_SCORES = 1 << 17  # of all samples and heads


class Auto(AttentionTangent):
    """`Triton` where it can run; elsewhere `Math` for few scores, which then is the faster one, and `Streaming`.

    Args:
        precision, autotune, cache_dir: of `Triton`.
    """

    def __init__(self, precision: str = "auto", autotune: bool = False, cache_dir: str = CACHE) -> None:
        self.math, self.streaming, self.triton = Math(), Streaming(), Triton(precision, autotune, cache_dir)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        few = q.shape[:-1].numel() * k.shape[-2] <= FEW_SCORES
        chosen = self.triton if self.triton.can_run(q, k, v) else self.math if few else self.streaming
        return chosen(q, k, v, dq, dk, dv, scale)


NAMES: dict[str, type[Auto | Math | Streaming | Triton]] = {
    "auto": Auto,
    "math": Math,
    "streaming": Streaming,
    "triton": Triton,
}


def resolve(attention: str | AttentionTangent) -> AttentionTangent:
    """The attention tangent of a name, or the object itself; raises `ConfigError` for an unknown name."""
    if isinstance(attention, AttentionTangent):
        return attention
    if attention not in NAMES:
        raise ConfigError(f"jvp.attention={attention} is unknown: choose one of {', '.join(NAMES)}.")
    return NAMES[attention]()
