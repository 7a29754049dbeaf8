"""Tiled over queries and keys in plain PyTorch: memory linear in the number of tokens, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.jvp.attention.base import AttentionTangent, check_shapes, wide


class Streaming(AttentionTangent):
    """One pass over the keys for each tile of queries, with a running maximum and four running sums.

    Beside the outputs it needs a few tiles [B, H, tile_queries, tile_keys], whatever N is. The sums over the keys,
    relative to the running maximum m of the scores S, are (the tangents' two appear where there are tangents):

        sum e^(S - m),   sum e^(S - m) v,   sum e^(S - m) dS,   sum e^(S - m) (dS v + dv)

    Args:
        tile_queries, tile_keys: sides of a tile.
    """

    def __init__(self, tile_queries: int = 256, tile_keys: int = 256) -> None:
        if tile_queries < 1 or tile_keys < 1:
            raise ConfigError(
                f"Tiles of {tile_queries} queries and {tile_keys} keys are empty: set jvp.attention.tile_queries and "
                "jvp.attention.tile_keys to at least 1 (256 is a good size)."
            )
        self.tile_queries, self.tile_keys = tile_queries, tile_keys

    def __repr__(self) -> str:
        return f"Streaming(tile_queries={self.tile_queries}, tile_keys={self.tile_keys})"

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
        check_shapes(q, k, v, dq, dk, dv)
        out, moved = v.new_empty(*q.shape[:-1], v.shape[-1]), v.new_empty(*q.shape[:-1], v.shape[-1])
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            for first in range(0, q.shape[2], self.tile_queries):
                rows = slice(first, first + self.tile_queries)
                tile = _Rows(q[:, :, rows], None if dq is None else dq[:, :, rows], v.shape[-1], scale)
                for start in range(0, k.shape[2], self.tile_keys):
                    keys = slice(start, start + self.tile_keys)
                    tile.add(*(None if x is None else wide(x[:, :, keys]) for x in (k, v, dk, dv)))
                out[:, :, rows], moved[:, :, rows] = tile.finish()
        return out, moved


class _Rows:
    """The running sums of one tile of queries."""

    def __init__(self, q: Tensor, dq: Tensor | None, width: int, scale: float) -> None:
        self.q = wide(q) * scale
        self.dq = None if dq is None else wide(dq) * scale
        column = (*q.shape[:-1], 1)
        self.maximum = self.q.new_full(column, -torch.inf)
        self.total, self.total_moved = self.q.new_zeros(column), self.q.new_zeros(column)
        self.sum, self.sum_moved = (self.q.new_zeros(*q.shape[:-1], width) for _ in range(2))

    def add(self, k: Tensor | None, v: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> None:
        """One tile of keys; the tiles of scores are reused in place."""
        assert k is not None and v is not None
        scores = self.q @ k.mT
        moved_scores = None if self.dq is None else self.dq @ k.mT
        if dk is not None:
            product = self.q @ dk.mT
            moved_scores = product if moved_scores is None else moved_scores.add_(product)
        maximum = torch.maximum(self.maximum, scores.amax(-1, keepdim=True))
        shrink = torch.exp(self.maximum - maximum)
        self.maximum = maximum
        p = scores.sub_(maximum).exp_()
        self.total.mul_(shrink).add_(p.sum(-1, keepdim=True))
        self.sum.mul_(shrink).add_(p @ v)
        self.sum_moved.mul_(shrink)
        if dv is not None:
            self.sum_moved.add_(p @ dv)
        if moved_scores is not None:
            weighted = moved_scores.mul_(p)
            self.total_moved.mul_(shrink).add_(weighted.sum(-1, keepdim=True))
            self.sum_moved.add_(weighted @ v)

    def finish(self) -> tuple[Tensor, Tensor]:
        """O and dO of these queries."""
        out = self.sum / self.total
        return out, self.sum_moved.div_(self.total).sub_(out * (self.total_moved / self.total))
