"""DiT (arXiv 2212.09748) as a velocity network: released key names, its noise prediction converted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowanchor.base.broadcast import like
from flowanchor.interfaces import StageContext
from flowanchor.plugins.backbones.dit_noise import noise_level, unit_scale, velocity
from flowanchor.plugins.backbones.sit import SiT


class DiT(SiT):
    """SiT's trunk, asked for the noise at one of DiT's levels, as a velocity of our flow (see `dit_noise`).

    A time beyond 1, as the expanded interval tells it, means the physical time 2 - t: the trunk is told minus the
    level, which is reflected about the data end, where the level is 0.
    """

    predictions = ("v",)  # the noise, that is, whose velocity has a conversion of its own

    def meaning(self) -> dict[str, Any]:
        """Its weights have SiT's names and shapes, and predict the noise of DiT's levels."""
        return {**super().meaning(), "": "dit"}

    def embed(self, x: Tensor, t: Tensor, cond: Tensor | None, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        """x [B, C, H, W], t [B] in [0, 2], labels [B], r [B] -> tokens [B, N, D] and the context (c, x, physical t)."""
        physical = 1 - (1 - t).abs()
        scale = like(unit_scale(physical), x).to(x.dtype)
        if r is not None and self.end_time != "auxiliary":  # whose embedder is its own; these share the one of levels
            r = _level(r)
        tokens, context = super().embed(x * scale, _level(t), cond, r)
        return tokens, StageContext((*context.carried, x, physical), context.fixed)

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        """Tokens [B, N, D] -> velocity [B, C, H, W]."""
        *_, x, physical = context.carried
        return velocity(x, physical, super().head(tokens, context))


def _level(t: Tensor) -> Tensor:
    """What the trunk is told at times t [B] in [0, 2]."""
    return noise_level(1 - (1 - t).abs()) * (1 - 2 * (t > 1).to(t.dtype))
