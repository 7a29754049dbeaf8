"""Encodes a source into files: each image once, each file by one process, the same whoever makes it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowanchor.base.files import replacing, sha256
from flowanchor.data.workers import in_order
from flowanchor.encoded.manifest import Manifest, Shard
from flowanchor.encoding.form import Form
from flowanchor.encoding.images import CroppedImages, ImageBatch
from flowanchor.encoding.plan import PlannedFile
from flowanchor.encoding.record import STAMP, EncodingRecord, FinishedShard
from flowanchor.encoding.writers import disk_space
from flowanchor.errors import DataError


@dataclass
class Encoder:
    """Encodes the files of one process into `out`.

    Args:
        form: what is made, of which images, by which codec.
        out: the folder.
        files: the form's plan.
        left_out: images that the plan leaves out, and why.
        batch_size: images per call of the codec (twice as many with flips).
        num_workers: processes that read images.
        process, processes: this one, of how many.
        max_unreadable: images that may be left out; None: any number.
        on_images: called with the number of images done since the last call.

    Raises:
        DataError: more images left out than allowed, latents that are not finite, a disk that is (or would be) full.
    """

    form: Form
    out: Path
    files: Sequence[PlannedFile]
    left_out: Sequence[str] = ()
    batch_size: int = 64
    num_workers: int = 0
    process: int = 0
    processes: int = 1
    max_unreadable: int | None = 0
    on_images: Callable[[int], None] = lambda images: None
    record: EncodingRecord = field(init=False)

    def __post_init__(self) -> None:
        self.record = EncodingRecord(self.out)
        self._check(self.left_out, "Nothing was encoded")

    # ------------------------------------------------------------------------------------------------------ the work

    def pending(self) -> list[PlannedFile]:
        """Files, of all processes, that are not there yet, or whose images were replaced since."""
        for file in self.files:
            self.record.forget_changed(file.number, self.form.stamp(file))
        return [file for file in self.files if self.record.finished(file.number) is None]

    def own(self, files: Iterable[PlannedFile]) -> list[PlannedFile]:
        """Those of this process: by their numbers, so that it does not matter what others have finished."""
        return [file for file in files if file.number % self.processes == self.process]

    def check_disk(self, pending: Iterable[PlannedFile]) -> None:
        """Raise `DataError` unless the disk has room for the latents that are pending."""
        needed = 0
        for file in pending:
            old = self.out / file.file  # will be replaced
            needed += self.form.bytes_needed(file) - (old.stat().st_size if old.is_file() else 0)
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise DataError(
                f"The latents need {needed / 1e9:.1f} GB and {self.out} has {free / 1e9:.1f} GB free: make room, "
                "choose another out=, or dtype=float16 for half of it."
            )

    def encode(self, pending: Iterable[PlannedFile]) -> Iterator[FinishedShard]:
        """Make this process' part of the files; yields each when it is finished."""
        own = self.own(pending)
        pieces = [np.array_split(f.indices, -(-len(f.indices) // self.batch_size)) for f in own]
        wanted = [(file.size, part) for file, parts in zip(own, pieces, strict=True) for part in parts]
        images = CroppedImages(self.form.source, self.form.crop, wanted, self.form.upright)
        batches = in_order(images, self.num_workers)
        for file, parts in zip(own, pieces, strict=True):
            yield self._encode(file, islice(batches, len(parts)))

    @torch.no_grad()
    def _encode(self, file: PlannedFile, batches: Iterator[ImageBatch]) -> FinishedShard:
        path, unreadable = self.out / file.file, list[str]()
        with disk_space(path), replacing(path) as draft:
            writer = self.form.writer(draft)
            for batch in batches:
                unreadable += batch.unreadable
                self._check([*self.left_out, *unreadable], "Finished files stay")
                if len(batch.indices):
                    writer.add(self.form.rows(batch))
                self.on_images(len(batch.indices) + len(batch.unreadable))
            if not writer.count:
                raise DataError(
                    f"No image for {file.file} could be read (the first: {unreadable[0]}): check data.root."
                )
            if writer.measured is not None and (flat := writer.measured.flat_channels()):
                warnings.warn(
                    f"All latents of {file.file} have one value in channel {flat[0]}: if those of the other files have "
                    "it, too, the set cannot be normalised. Are these pictures of one flat colour?",
                    stacklevel=2,
                )
            writer.close()
            shard = Shard(file.file, writer.count, draft.stat().st_size, sha256(draft))
        statistics = {} if writer.measured is None else writer.measured.state()
        finished = FinishedShard(shard, tuple(unreadable), statistics, self.form.stamp(file))
        self.record.finish(file.number, finished)
        return finished

    def _check(self, left_out: Sequence[str], rest: str) -> None:
        if self.max_unreadable is not None and len(left_out) > self.max_unreadable:
            raise DataError(
                f"{len(left_out)} images {self.form.lack} ({'; '.join(left_out[-3:])}): repair them, or leave them out "
                f"by max_unreadable={len(left_out)} or more (now {self.max_unreadable}). {rest}."
            )

    # -------------------------------------------------------------------------------------------------------- the end

    def complete(self, settings: dict[str, Any]) -> Manifest | None:
        """Write what stands beside the files, and the manifest, once every file is there; None before that."""
        found = [self.record.finished(file.number) for file in self.files]
        finished = [shard for shard in found if shard is not None]
        if len(finished) < len(self.files):
            return None
        left_out = [*self.left_out, *(name for shard in finished for name in shard.unreadable)]
        spoilt = ", ".join(shard.shard.file for shard in finished if shard.unreadable)
        self._check(left_out, f"Once they are repaired, the same command makes {spoilt} again")
        source = {**settings, STAMP: self.form.source.stamp()}
        manifest = self.form.complete(self.out, finished, left_out, source)
        manifest.write(self.out)
        return manifest
