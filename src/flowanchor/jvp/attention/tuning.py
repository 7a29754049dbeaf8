"""The fastest tile by measurement (`jvp.attention.autotune=true`): timed once, and remembered on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowanchor.base.files import write_json
from flowanchor.base.plain import read_json
from flowanchor.errors import FlowAnchorError
from flowanchor.jvp.attention.tiles import Card, Tile, candidates

SHORTEST, LONGEST = 256, 16_384  # between these, lengths belong together that have the same next power of two
_KNOWN: dict[tuple[Path, str], Tile] = {}


def tuned(
    card: Card,
    d: int,
    dtype: torch.dtype,
    precision: str,
    keys: int,
    run: Callable[[Tile], Any],
    cache_dir: str,
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> Tile:
    """The tile for heads of d channels and so many keys on this card; measured where neither memory nor disk knows it.

    Args:
        run: computes the caller's attention with a tile.
        cache_dir: holds one file per kind of card. What cannot be read is measured again, and where it cannot be
            written the tile is known to this process only.
        seconds: what a call takes (Triton's `do_bench`: the median of some tenths of a second).
    """
    path = Path(cache_dir).expanduser() / f"attention-{re.sub('[^a-z0-9]+', '-', card.name.lower()).strip('-')}.json"
    kind = str(dtype).removeprefix("torch.") + (f" {precision}" if dtype == torch.float32 else "")
    name = f"{_triton().VERSION}, head {d}, {kind}, {length_class(keys)} keys"
    offered = candidates(d, dtype, card, precision)
    if (path, name) not in _KNOWN:
        remembered = _remembered(path).get(name)
        found = next((tile for tile in offered if list(tile) == remembered), None)
        if found is None:
            found = _fastest(offered, run, seconds or _median)
            with suppress(OSError):
                write_json(path, {**_remembered(path), name: list(found)}, shared=True)
        _KNOWN[path, name] = found
    return _KNOWN[path, name]


def length_class(keys: int) -> int:
    """The next power of two, from 256 to 16,384."""
    return min(max(1 << (keys - 1).bit_length(), SHORTEST), LONGEST)


def _fastest(offered: list[Tile], run: Callable[[Tile], Any], seconds: Callable[[Callable[[], Any]], float]) -> Tile:
    """The tile of the smallest time; the first one, which is the table's, where none can be timed."""
    times = {}
    for tile in offered:
        # What the compiler or the card refuses (too much shared memory, too many registers) is no candidate.
        with suppress(RuntimeError, _triton().OutOfResources):
            times[tile] = seconds(partial(run, tile))
    return min(times, key=lambda tile: times[tile], default=offered[0])


def _median(call: Callable[[], Any]) -> float:
    return float(_triton().do_bench(call, return_mode="median"))


def _triton() -> Any:
    """The one module that imports the package triton, which not every machine has."""
    from flowanchor.jvp.attention import triton_kernel

    return triton_kernel


def _remembered(path: Path) -> dict[str, Any]:
    with suppress(OSError, FlowAnchorError):
        found = read_json(path)
        if isinstance(found, dict):
            return found
    return {}
