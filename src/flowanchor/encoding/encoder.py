"""Encodes a source into files of latents: each image once, each file by one process, the same whoever makes it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowanchor.base.reading import shown
from flowanchor.encoded.manifest import Manifest
from flowanchor.encoded.statistics import STATISTICS, RunningStatistics
from flowanchor.encoding.images import ImageBatch, load_batches
from flowanchor.encoding.plan import PlannedShard, plan_shards
from flowanchor.encoding.record import STAMP, EncodingRecord, FinishedShard
from flowanchor.encoding.sources import Source
from flowanchor.encoding.writers import DTYPES, bytes_needed, open_writer, write_index
from flowanchor.errors import DataError
from flowanchor.interfaces import Codec
from flowanchor.sampling.noise import sample_noise


@dataclass(frozen=True)
class Encoding:
    """What is made of the images; every field shows in the result.

    Attributes:
        layout: `safetensors` or `webdataset`.
        values: `sample` (draws from the posterior) or `moments` (mean, then log-variance).
        image_size: height and width of the crop.
        flips: the mirrored images' latents as well.
        dtype: of the stored values.
        shard_size: images per file.
        shuffle: a permutation drawn from the seed instead of the source's order.
        seed: of the permutation and of the posterior's draws.
        upright: photos are turned as their EXIF data says; the released latents of ImageNet were made without.
    """

    layout: str = "safetensors"
    values: str = "sample"
    image_size: int = 256
    flips: bool = True
    dtype: str = "float32"
    shard_size: int = 10_000
    shuffle: bool = False
    seed: int = 0
    upright: bool = True


@dataclass
class Encoder:
    """Encodes the shards of one process into `out`.

    Args:
        source: the images.
        codec: on its device.
        encoding: what is made of them.
        out: the folder.
        batch_size: images per call of the codec (twice as many with flips).
        num_workers: processes that read images.
        process, processes: this one, of how many.
        max_unreadable: images that may be left out; None: any number.
        on_images: called with the number of images done since the last call.

    Raises:
        DataError: more unreadable images than allowed, latents that are not finite, a disk that is (or would be) full.
    """

    source: Source
    codec: Codec
    encoding: Encoding
    out: Path
    batch_size: int = 64
    num_workers: int = 0
    process: int = 0
    processes: int = 1
    max_unreadable: int | None = 0
    on_images: Callable[[int], None] = lambda images: None
    shards: list[PlannedShard] = field(init=False)

    def __post_init__(self) -> None:
        e = self.encoding
        self.record = EncodingRecord(self.out)
        self.shards = plan_shards(len(self.source), e.layout, e.shard_size, e.shuffle, e.seed)
        side = e.image_size // self.codec.downsampling
        self.shape = (self.codec.latent_channels or 3, side, side)

    # ------------------------------------------------------------------------------------------------------ the work

    def pending(self) -> list[PlannedShard]:
        """Shards, of all processes, that are not there yet, or whose images were replaced since."""
        for shard in self.shards:
            self.record.forget_changed(shard.number, self.source.stamp(shard.indices))
        return [shard for shard in self.shards if self.record.finished(shard.number) is None]

    def own(self, shards: list[PlannedShard]) -> list[PlannedShard]:
        """Those of this process: by their numbers, so that it does not matter what others have finished."""
        return [shard for shard in shards if shard.number % self.processes == self.process]

    def missing(self, manifest: Manifest) -> list[str]:
        """Files of a complete set that are not there, or not whole, any more."""
        paths = {shard.file: self.out / shard.file for shard in manifest.shards}
        sizes = {shard.file: shard.bytes for shard in manifest.shards}
        return [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != sizes[name]]

    def check_disk(self, pending: list[PlannedShard]) -> None:
        """Raise `DataError` unless the disk has room for what is pending."""
        e = self.encoding
        stored = (1 + e.flips, self.shape[0] * (2 if e.values == "moments" else 1), *self.shape[1:])
        needed = sum(bytes_needed(len(shard.indices), stored, e.dtype, e.layout) for shard in pending)
        needed -= sum(f.stat().st_size for s in pending if (f := self.out / s.file).is_file())  # will be replaced
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise DataError(
                f"The latents need {needed / 1e9:.1f} GB and {self.out} has {free / 1e9:.1f} GB free: make room, "
                "choose another out=, or dtype=float16 for half of it."
            )

    def encode(self, pending: list[PlannedShard]) -> Iterator[FinishedShard]:
        """Make this process' part of the shards; yields each when it is finished."""
        own = self.own(pending)
        pieces = [np.array_split(s.indices, -(-len(s.indices) // self.batch_size)) for s in own]
        parts = [part for parts in pieces for part in parts]
        e = self.encoding
        batches = load_batches(self.source, e.image_size, parts, self.num_workers, e.upright)
        for shard, parts in zip(own, pieces, strict=True):
            yield self._encode_shard(shard, (next(batches) for _ in parts))

    @torch.no_grad()
    def _encode_shard(self, shard: PlannedShard, batches: Iterator[ImageBatch]) -> FinishedShard:
        writer = open_writer(self.encoding.layout, self.out / shard.file)
        statistics, unreadable = RunningStatistics(self.shape[0]), []
        for batch in batches:
            unreadable += batch.unreadable
            if self.max_unreadable is not None and len(unreadable) > self.max_unreadable:
                raise DataError(self._too_many(unreadable, "Finished files stay"))
            if len(batch.indices):
                latents = self._latents(batch)
                values = latents[:, :, : self.shape[0]]  # of moments, the mean
                statistics.add(values.flatten(0, 1))
                writer.add(batch.indices, latents, self.source.labels[batch.indices])
            self.on_images(len(batch.indices) + len(batch.unreadable))
        if not writer.count:
            raise DataError(f"No image for {shard.file} could be read (the first: {unreadable[0]}): check data.root.")
        flat = statistics.flat_channels()
        if flat:
            warnings.warn(
                f"All latents of {shard.file} have one value in channel {flat[0]}: if those of the other files have "
                "it, too, the set cannot be normalised. Are these pictures of one flat colour?",
                stacklevel=2,
            )
        stamp = self.source.stamp(shard.indices)
        finished = FinishedShard(writer.finish(), tuple(unreadable), statistics.state(), stamp)
        self.record.finish(shard.number, finished)
        return finished

    def _latents(self, batch: ImageBatch) -> Tensor:
        """[B, F, C, h, w] as stored, on the CPU."""
        device = next(chain(self.codec.parameters(), self.codec.buffers()), batch.images).device
        pixels = batch.images.to(device).float() / 127.5 - 1
        views = [pixels, pixels.flip(-1)] if self.encoding.flips else [pixels]
        stored = torch.stack([self._values(view, batch, draw) for draw, view in enumerate(views)], dim=1)
        broken = (~stored.isfinite()).flatten(1).any(1)
        if bool(broken.any()):
            name = shown(self.source.names[int(batch.indices[int(broken.nonzero()[0])])])
            raise DataError(
                f"The latents of {name} are not finite in {self.encoding.dtype}: encode with codec.dtype=float32 and "
                "dtype=float32, and check the codec's weights."
            )
        return stored

    def _values(self, pixels: Tensor, batch: ImageBatch, draw: int) -> Tensor:
        posterior = self.codec.posterior(pixels)
        if tuple(posterior.mean.shape[1:]) != self.shape:
            raise DataError(f"The codec makes latents of shape {tuple(posterior.mean.shape[1:])}, not {self.shape}.")
        if self.encoding.values == "moments" and posterior.logvar is not None:
            values = torch.cat([posterior.mean, posterior.logvar], dim=1)
        else:
            noise = sample_noise(self.encoding.seed, batch.indices.tolist(), self.shape, draw).to(posterior.mean)
            values = posterior.sample(noise)
        return values.to("cpu", DTYPES[self.encoding.dtype])

    def _too_many(self, unreadable: list[str], rest: str) -> str:
        return (
            f"{len(unreadable)} images cannot be read, the last is {unreadable[-1]}: repair them, or leave them out by "
            f"max_unreadable={len(unreadable)} or more (now {self.max_unreadable}). {rest}."
        )

    # -------------------------------------------------------------------------------------------------------- the end

    def complete(self, settings: dict[str, Any]) -> Manifest | None:
        """Write statistics, index and manifest once every shard is there; None before that."""
        found = [self.record.finished(shard.number) for shard in self.shards]
        finished = [shard for shard in found if shard is not None]
        if len(finished) < len(self.shards):
            return None
        unreadable = [name for shard in finished for name in shard.unreadable]
        if self.max_unreadable is not None and len(unreadable) > self.max_unreadable:
            files = ", ".join(shard.shard.file for shard in finished if shard.unreadable)
            raise DataError(self._too_many(unreadable, f"Once they are repaired, the same command makes {files} again"))
        e = self.encoding
        statistics = RunningStatistics(self.shape[0])
        for shard in finished:
            statistics.merge(shard.statistics)
        statistics.statistics().write(self.out / STATISTICS)
        shards = [shard.shard for shard in finished]
        if e.layout == "webdataset":
            write_index(self.out, self.out.name, shards)
        manifest = Manifest(
            layout=e.layout,
            values=e.values,
            shape=self.shape,
            count=sum(shard.count for shard in shards),
            flips=e.flips,
            dtype=e.dtype,
            image_size=e.image_size,
            num_classes=self.source.num_classes,
            class_names=self.source.class_names,
            codec={"name": self.codec.name, "digest": settings["codec"]},
            seed=e.seed,
            shards=tuple(shards),
            unreadable=tuple(sorted(unreadable)),
            source={**settings, STAMP: self.source.stamp()},
        )
        manifest.write(self.out)
        return manifest
