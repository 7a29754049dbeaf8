"""Tiled over heads, queries and keys in plain PyTorch: memory linear in the number of tokens, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.jvp.attention.base import AttentionTangent, check_shapes, wide

# Queries and keys of a tile. On CUDA larger ones: each costs some seventeen launches, and its scores are few there.
TILE, CUDA_TILE = (256, 256), (1024, 4096)
# Scores of a tile on the CPU: few enough to stay in its cache from one operation to the next.
CPU_TILE = 4 * 256 * 256


class Streaming(AttentionTangent):
    """One pass over the keys for each tile of queries, with a running maximum and four running sums.

    Six matrix products with all three tangents. On the CPU a tile takes as many heads and samples as its cache holds,
    so that beside the outputs two or three tiles of fixed size are needed, whatever B, H and N are. Elsewhere it takes
    all of them, [B, H, tile_queries, tile_keys], because small kernels would leave a GPU idle. The sums over the keys,
    relative to the running maximum m of the scores S, are (the tangents' two appear where there are tangents):

        sum e^(S - m),   sum e^(S - m) v,   sum e^(S - m) dS,   sum e^(S - m) (dS v + dv)

    Args:
        tile_queries, tile_keys: sides of a tile; None: 256 x 256, and 1,024 x 4,096 on CUDA.
    """

    def __init__(self, tile_queries: int | None = None, tile_keys: int | None = None) -> None:
        if any(side is not None and side < 1 for side in (tile_queries, tile_keys)):
            raise ConfigError(
                f"Tiles of {tile_queries} queries and {tile_keys} keys are empty: set jvp.attention.tile_queries and "
                "jvp.attention.tile_keys to at least 1 (256 is a good size), or leave them out."
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
        queries, keys = self.sides(q)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            for rows in _tiles(q, k.shape[2], queries, keys):
                tile = _Rows(q[rows], None if dq is None else dq[rows], v.shape[-1], scale)
                for start in range(0, k.shape[2], keys):
                    at = (*rows[:2], slice(start, start + keys))
                    tile.add(*(None if x is None else wide(x[at]).flatten(0, 1) for x in (k, v, dk, dv)))
                shape = out[rows].shape
                out[rows], moved[rows] = (part.view(shape) for part in tile.finish())
        return out, moved

    def sides(self, q: Tensor) -> tuple[int, int]:
        """Queries and keys of a tile, on the device of q."""
        queries, keys = CUDA_TILE if q.is_cuda else TILE
        return self.tile_queries or queries, self.tile_keys or keys


def _tiles(q: Tensor, size_keys: int, queries: int, keys: int) -> Iterator[tuple[slice, slice, slice]]:
    """Samples, heads and queries of each tile."""
    batch, heads, size_queries = q.shape[:3]
    room = batch * heads
    if q.device.type == "cpu":
        room = max(1, CPU_TILE // max(1, min(queries, size_queries) * min(keys, size_keys)))
    samples, together = max(1, room // max(1, heads)), max(1, min(heads, room))
    for sample in range(0, batch, samples):
        for head in range(0, heads, together):
            for query in range(0, size_queries, queries):
                yield slice(sample, sample + samples), slice(head, head + together), slice(query, query + queries)


class _Rows:
    """The running sums of one tile of queries; samples and heads are one dimension."""

    def __init__(self, q: Tensor, dq: Tensor | None, width: int, scale: float) -> None:
        self.q = (wide(q) * scale).flatten(0, 1)
        self.dq = None if dq is None else (wide(dq) * scale).flatten(0, 1)
        column = (*self.q.shape[:-1], 1)
        self.maximum = self.q.new_full(column, -torch.inf)
        self.total, self.total_moved = self.q.new_zeros(column), self.q.new_zeros(column)
        self.sum, self.sum_moved = (self.q.new_zeros(*self.q.shape[:-1], width) for _ in range(2))

    def add(self, k: Tensor | None, v: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> None:
        """One tile of keys; the tiles of scores are reused in place."""
        assert k is not None and v is not None
        scores = self.q @ k.mT
        moved_scores = None if self.dq is None else self.dq @ k.mT
        if dk is not None:
            moved_scores = self.q @ dk.mT if moved_scores is None else _add_product(moved_scores, self.q, dk.mT)
        maximum = torch.maximum(self.maximum, scores.amax(-1, keepdim=True))
        shrink = torch.exp(self.maximum - maximum)
        self.maximum = maximum
        p = scores.sub_(maximum).exp_()
        self.total.mul_(shrink).add_(p.sum(-1, keepdim=True))
        _add_product(self.sum.mul_(shrink), p, v)
        self.sum_moved.mul_(shrink)
        if dv is not None:
            _add_product(self.sum_moved, p, dv)
        if moved_scores is not None:
            weighted = moved_scores.mul_(p)
            self.total_moved.mul_(shrink).add_(weighted.sum(-1, keepdim=True))
            _add_product(self.sum_moved, weighted, v)

    def finish(self) -> tuple[Tensor, Tensor]:
        """O and dO of these queries."""
        out = self.sum / self.total
        return out, self.sum_moved.div_(self.total).sub_(out * (self.total_moved / self.total))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total += a @ b`, without a tensor for the product."""
    return torch.baddbmm(total, a, b, out=total)
