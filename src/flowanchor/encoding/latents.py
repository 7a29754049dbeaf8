"""Latents of images of one size, plain and mirrored, with their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowanchor.base.noise import sample_noise
from flowanchor.encoded.manifest import LatentManifest
from flowanchor.encoded.statistics import STATISTICS, RunningStatistics
from flowanchor.encoding.buckets import Size
from flowanchor.encoding.crop import square
from flowanchor.encoding.form import Form
from flowanchor.encoding.plan import PlannedFile, plan_latents
from flowanchor.encoding.record import FinishedShard
from flowanchor.encoding.sources import Source
from flowanchor.encoding.writers import LatentWriter, open_writer, write_index
from flowanchor.errors import DataError
from flowanchor.interfaces import Codec


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


class Latents(Form):
    """Raw latents of the posterior, [F, C, h, w] of each image (F: plain and mirrored), as released ones are."""

    manifest = LatentManifest
    crop = staticmethod(square)

    def __init__(self, source: Source, codec: Codec, encoding: Encoding) -> None:
        self.source, self.codec, self.encoding = source, codec, encoding
        self.dtype, self.upright = encoding.dtype, encoding.upright
        side = encoding.image_size // codec.downsampling
        self.shape = (self.channels, side, side)

    def settings(self, codec_dtype: str, batch_size: int) -> dict[str, Any]:
        return {
            **self.encoding.__dict__,
            "codec": self.codec.fingerprint(),
            "codec_dtype": codec_dtype,
            "images": self.source.digest(),
            "batch_size": batch_size,
        }

    def plan(self, on_image: Callable[[], None] = lambda: None) -> tuple[list[PlannedFile], list[str]]:
        e = self.encoding
        size = (e.image_size, e.image_size)
        return plan_latents(len(self.source), size, e.layout, e.shard_size, e.shuffle, e.seed), []

    def stored_shape(self, size: Size) -> tuple[int, ...]:
        channels, height, width = self.shape
        moments = self.encoding.values == "moments"
        return (2 if self.encoding.flips else 1, channels * (2 if moments else 1), height, width)

    def values(self, pixels: Tensor, indices: np.ndarray) -> Tensor:
        views = [pixels, pixels.flip(-1)] if self.encoding.flips else [pixels]
        return torch.stack([self._view(view, indices, draw) for draw, view in enumerate(views)], dim=1)

    def _view(self, pixels: Tensor, indices: np.ndarray, draw: int) -> Tensor:
        posterior = self.codec.posterior(pixels)
        if tuple(posterior.mean.shape[1:]) != self.shape:
            raise DataError(f"The codec makes latents of shape {tuple(posterior.mean.shape[1:])}, not {self.shape}.")
        if self.encoding.values == "moments" and posterior.logvar is not None:
            return torch.cat([posterior.mean, posterior.logvar], dim=1)
        noise = sample_noise(self.encoding.seed, indices.tolist(), self.shape, draw).to(posterior.mean)
        return posterior.sample(noise)

    def writer(self, draft: Path) -> LatentWriter:
        return open_writer(self.encoding.layout, draft, self.channels)

    def complete(
        self, out: Path, finished: Sequence[FinishedShard], unreadable: Sequence[str], source: dict[str, Any]
    ) -> LatentManifest:
        """Beside the files stand their statistics and, with tars, an index."""
        e = self.encoding
        statistics = RunningStatistics(self.channels)
        for found in finished:
            statistics.merge(found.statistics)
        statistics.statistics().write(out / STATISTICS)
        shards = [found.shard for found in finished]
        if e.layout == "webdataset":
            write_index(out, out.name, shards)
        return LatentManifest(
            layout=e.layout,
            values=e.values,
            shape=self.shape,
            count=sum(shard.count for shard in shards),
            flips=e.flips,
            dtype=e.dtype,
            image_size=e.image_size,
            num_classes=self.source.num_classes,
            class_names=self.source.class_names,
            codec={"name": self.codec.name, "digest": source["codec"]},
            seed=e.seed,
            shards=tuple(shards),
            unreadable=tuple(sorted(unreadable)),
            source=source,
        )
