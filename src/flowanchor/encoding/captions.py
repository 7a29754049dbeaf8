"""Encodes captioned images: each file holds one bucket, made by one process, and is the same whoever makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from flowanchor.base.files import write_tensors
from flowanchor.base.reading import shown
from flowanchor.data.pictures import UNREADABLE, open_picture, picture_size, reason_of
from flowanchor.data.workers import in_order
from flowanchor.encoded.captions import NEGATIVE, CaptionManifest, write_file
from flowanchor.encoding.buckets import Size, fit, nearest
from flowanchor.encoding.caption_sources import HEADER, CaptionedSource
from flowanchor.encoding.images import ImageBatch
from flowanchor.encoding.record import STAMP, EncodingRecord, FinishedShard
from flowanchor.encoding.writers import DTYPES, disk_space
from flowanchor.errors import DataError
from flowanchor.interfaces import Codec
from flowanchor.text.base import TextEncoder


@dataclass(frozen=True, eq=False)
class PlannedFile:
    """One file: its number, the size of its images, and which they are."""

    number: int
    size: Size
    indices: np.ndarray

    @property
    def file(self) -> str:
        return f"captions-{self.number:05d}.safetensors"


def plan(
    source: CaptionedSource, sizes: Sequence[Size], shard_size: int, on_image: Callable[[], None] = lambda: None
) -> tuple[list[PlannedFile], list[str]]:
    """Which image goes into which file, by the sizes in the images' headers; and those that cannot be read."""
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
    return [PlannedFile(number, *part) for number, part in enumerate(parts)], unreadable


def _size(source: CaptionedSource, index: int) -> Size:
    """Height and width, from the beginning of the file where that tells them."""
    for count in (HEADER, None):
        try:
            width, height = picture_size(source.read(index, count))
            return height, width
        except UNREADABLE:
            if count is None:
                raise
    raise AssertionError


class _Fitted(Dataset[ImageBatch]):
    """Batches of one size each, by the indices of their images."""

    def __init__(self, source: CaptionedSource, batches: Sequence[tuple[Size, np.ndarray]]) -> None:
        self.source, self.batches = source, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> ImageBatch:
        size, wanted = self.batches[number]
        images, indices, unreadable = [], [], []
        for index in wanted.tolist():
            try:
                images.append(pil_to_tensor(fit(open_picture(self.source.read(index), "RGB"), size)))
                indices.append(index)
            except UNREADABLE as error:
                unreadable.append(f"{shown(self.source.names[index])}: {reason_of(error)}")
        stacked = torch.stack(images) if images else torch.empty(0, 3, *size, dtype=torch.uint8)
        return ImageBatch(stacked, np.asarray(indices, dtype=np.int64), unreadable)


@dataclass
class CaptionEncoder:
    """Encodes the files of one process into `out`.

    Args:
        source: images and captions.
        codec, text: on their devices.
        out: the folder.
        files: `plan`'s.
        unreadable: images that the plan left out already, and those without a caption.
        dtype: of stored latents and embeddings.
        batch_size: images per call of the codec.
        num_workers: processes that read images.
        process, processes: this one, of how many.
        max_unreadable: images that may be left out; None: any number.
        on_images: called with the number of images done since the last call.

    Raises:
        DataError: more unreadable images than allowed, latents that are not finite.
    """

    source: CaptionedSource
    codec: Codec
    text: TextEncoder
    out: Path
    files: list[PlannedFile]
    unreadable: list[str]
    dtype: str = "float32"
    batch_size: int = 16
    num_workers: int = 0
    process: int = 0
    processes: int = 1
    max_unreadable: int | None = 0
    on_images: Callable[[int], None] = lambda images: None
    record: EncodingRecord = field(init=False)

    def __post_init__(self) -> None:
        self.record = EncodingRecord(self.out)
        self._check(self.unreadable)

    def _check(self, unreadable: Sequence[str]) -> None:
        if self.max_unreadable is not None and len(unreadable) > self.max_unreadable:
            shown = "; ".join(unreadable[:3])
            raise DataError(
                f"{len(unreadable)} images cannot be read or have no caption ({shown}), and max_unreadable="
                f"{self.max_unreadable}: repair them, or allow more of them."
            )

    def pending(self) -> list[PlannedFile]:
        """Files of this process that are not there yet, or whose images were replaced since."""
        for file in self.files:
            self.record.forget_changed(file.number, self._stamp(file))
        own = [file for file in self.files if file.number % self.processes == self.process]
        return [file for file in own if self.record.finished(file.number) is None]

    def encode(self, pending: Sequence[PlannedFile]) -> Iterator[FinishedShard]:
        """Make them; yields each when it is finished."""
        pieces = [np.array_split(file.indices, -(-len(file.indices) // self.batch_size)) for file in pending]
        batches = [(file.size, part) for file, parts in zip(pending, pieces, strict=True) for part in parts]
        loader = in_order(_Fitted(self.source, batches), self.num_workers)
        for file, parts in zip(pending, pieces, strict=True):
            yield self._file(file, islice(loader, len(parts)))

    @torch.no_grad()
    def _file(self, file: PlannedFile, batches: Iterator[ImageBatch]) -> FinishedShard:
        latents, unreadable, rows = [], [], []
        for batch in batches:
            unreadable += batch.unreadable
            rows += batch.indices.tolist()
            if len(batch.indices):
                latents.append(self._latents(batch))
            self.on_images(len(batch.indices) + len(batch.unreadable))
        self._check([*self.unreadable, *unreadable])
        if not latents:
            raise DataError(f"No image for {file.file} could be read (the first: {unreadable[0]}): check data.root.")
        captions = [self.source.captions[row] for row in rows]
        embeddings = [[text.to(DTYPES[self.dtype]) for text in self.text.encode(texts)] for texts in captions]
        names = [self.source.names[row] for row in rows]
        shard = write_file(self.out / file.file, torch.cat(latents), embeddings, names, captions)
        finished = FinishedShard(shard, tuple(unreadable), {}, self._stamp(file))
        self.record.finish(file.number, finished)
        return finished

    def _stamp(self, file: PlannedFile) -> str:
        """Of its images, and of its size: a replaced picture may belong to another one."""
        height, width = file.size
        return f"{height} x {width} {self.source.stamp(file.indices)}"

    def _latents(self, batch: ImageBatch) -> Tensor:
        """[B, C, F, h, w], on the CPU."""
        device = next(chain(self.codec.parameters(), self.codec.buffers()), batch.images).device
        found = self.codec.encode(batch.images.to(device).float() / 127.5 - 1)
        found = (found[:, :, None] if found.ndim == 4 else found).to("cpu", DTYPES[self.dtype])
        broken = (~found.isfinite()).flatten(1).any(1)
        if bool(broken.any()):
            name = shown(self.source.names[int(batch.indices[int(broken.nonzero()[0])])])
            raise DataError(
                f"The latents of {name} are not finite in {self.dtype}: use dtype=float32 and check the codec."
            )
        return found

    def complete(self, settings: dict[str, Any], negative: str) -> CaptionManifest | None:
        """Write the negative prompt and the manifest once every file is there; None before that."""
        found = [self.record.finished(file.number) for file in self.files]
        finished = [shard for shard in found if shard is not None]
        if len(finished) < len(self.files):
            return None
        unreadable = [*self.unreadable, *(name for shard in finished for name in shard.unreadable)]
        self._check(unreadable)
        embeddings = self.text.encode([negative])[0]
        with disk_space(self.out / NEGATIVE):
            write_tensors(self.out / NEGATIVE, {"text": embeddings.contiguous()})
        from flowanchor.encoded.captions import CaptionFile

        shapes = [tuple(CaptionFile(self.out / file.file).latents([0]).shape[1:]) for file in self.files]
        manifest = CaptionManifest(
            count=sum(shard.shard.count for shard in finished),
            shape=(shapes[0][0], shapes[0][1]),
            text_width=self.text.width,
            shards=tuple(shard.shard for shard in finished),
            sizes=tuple((shape[2], shape[3]) for shape in shapes),
            codec={"name": self.codec.name, "digest": settings["codec"]},
            text_encoder={"name": self.text.name, "digest": settings["text_encoder"]},
            negative=negative,
            unreadable=tuple(unreadable),
            source={**settings, STAMP: self.source.stamp()},
        )
        manifest.write(self.out)
        return manifest
