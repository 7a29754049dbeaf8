"""Which image goes into which file: fixed before anything is encoded, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LAYOUTS = ("safetensors", "webdataset")


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """One file: its number, its name, and the images (indices of the source) in their order."""

    number: int
    file: str
    indices: np.ndarray


def plan_shards(count: int, layout: str, shard_size: int, shuffle: bool, seed: int) -> list[PlannedShard]:
    """Cut `count` images into files of `shard_size`, in the source's order or in a permutation drawn from the seed.

    The names of the released layout count processes and files; here the plan is that of one process, since the number
    of processes must not show in the result.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(count) if shuffle else np.arange(count)
    parts: Sequence[np.ndarray] = [order[start : start + shard_size] for start in range(0, count, shard_size)]
    width = len(str(len(parts) - 1))
    return [PlannedShard(number, _name(layout, number, width), part) for number, part in enumerate(parts)]


def _name(layout: str, number: int, width: int) -> str:
    if layout == "safetensors":
        return f"latents_rank00_shard{number:0{max(3, width)}d}.safetensors"
    return f"shard-{number:0{max(6, width)}d}.tar"
