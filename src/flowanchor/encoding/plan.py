"""Which image goes into which file: fixed before anything is encoded, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flowanchor.base.reading import shown
from flowanchor.data.pictures import UNREADABLE, picture_size, reason_of
from flowanchor.encoding.buckets import Size, nearest
from flowanchor.encoding.caption_sources import CaptionedSource

LAYOUTS = ("safetensors", "webdataset")
HEADER = 1 << 15  # bytes of a file that nearly always tell an image's size


@dataclass(frozen=True, eq=False)
class PlannedFile:
    """One file: its number, its name, the size of its images, and which they are (indices of the source), in order."""

    number: int
    file: str
    size: Size
    indices: np.ndarray


def plan_latents(
    count: int, size: Size, layout: str, shard_size: int, shuffle: bool = False, seed: int = 0
) -> list[PlannedFile]:
    """Cut `count` images into files of `shard_size`, in the source's order or in a permutation drawn from the seed.

    The names of the released layout count processes and files; here the plan is that of one process, since the number
    of processes must not show in the result.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(count) if shuffle else np.arange(count)
    parts: Sequence[np.ndarray] = [order[start : start + shard_size] for start in range(0, count, shard_size)]
    width = len(str(len(parts) - 1))
    return [PlannedFile(number, _name(layout, number, width), size, part) for number, part in enumerate(parts)]


def plan_captions(
    source: CaptionedSource, sizes: Sequence[Size], shard_size: int, on_image: Callable[[], None] = lambda: None
) -> tuple[list[PlannedFile], list[str]]:
    """Files of one size each, by the sizes in the images' headers; and the images that cannot be read."""
    buckets: dict[Size, list[int]] = {size: [] for size in sizes}
    unreadable = []
    for index in range(len(source)):
        try:
            buckets[nearest(_size(source, index), sizes)].append(index)
        except UNREADABLE as error:
            unreadable.append(f"{shown(source.names[index])}: {reason_of(error)}")
        on_image()
    parts = [
        (size, np.asarray(found[start : start + shard_size], dtype=np.int64))
        for size, found in buckets.items()
        for start in range(0, len(found), shard_size)
    ]
    files = [PlannedFile(number, f"captions-{number:05d}.safetensors", *part) for number, part in enumerate(parts)]
    return files, unreadable


def _name(layout: str, number: int, width: int) -> str:
    if layout == "safetensors":
        return f"latents_rank00_shard{number:0{max(3, width)}d}.safetensors"
    return f"shard-{number:0{max(6, width)}d}.tar"


def _size(source: CaptionedSource, index: int) -> Size:
    """Height and width, from the beginning of the file where that tells them."""
    try:
        width, height = picture_size(source.read(index, HEADER))
    except UNREADABLE:
        width, height = picture_size(source.read(index))
    return height, width
