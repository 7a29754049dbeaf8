"""What can be made of a source's images: latents alone, or latents with the embeddings of captions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.reading import shown
from flowanchor.encoded.manifest import Manifest
from flowanchor.encoding.buckets import Size
from flowanchor.encoding.images import Crop, ImageBatch
from flowanchor.encoding.plan import PlannedFile
from flowanchor.encoding.record import FinishedShard
from flowanchor.encoding.sources import Source
from flowanchor.encoding.writers import Rows, ShardWriter
from flowanchor.errors import DataError
from flowanchor.interfaces import Codec


class Form(ABC):
    """Which file holds which images, what is stored of each, and what completes the set.

    Attributes:
        manifest: the kind of manifest.
        lack: what is said of images that are left out.
        source: the images.
        codec: on its device.
        crop: an image to one of a size.
        dtype: of the stored values, by name.
        upright: photos are turned as their EXIF data says.
    """

    manifest: type[Manifest]
    lack = "cannot be read"
    source: Source
    codec: Codec
    crop: Crop
    dtype: str
    upright: bool = True

    @abstractmethod
    def settings(self, codec_dtype: str, batch_size: int) -> dict[str, Any]:
        """All that decides what the files hold, in the order in which it is written."""

    @abstractmethod
    def plan(self, on_image: Callable[[], None] = lambda: None) -> tuple[list[PlannedFile], list[str]]:
        """The files, and the images that are left out already, and why; `on_image` is called for each that is read."""

    @abstractmethod
    def stored_shape(self, size: Size) -> tuple[int, ...]:
        """Of the latents of one image of this height and width."""

    @abstractmethod
    def values(self, pixels: Tensor, indices: np.ndarray) -> Tensor:
        """What is stored of images [B, 3, H, W] in [-1, 1], `indices` in the source: [B, *stored_shape]."""

    @abstractmethod
    def writer(self, draft: Path) -> ShardWriter:
        """For one file."""

    @abstractmethod
    def complete(
        self, out: Path, finished: Sequence[FinishedShard], unreadable: Sequence[str], source: dict[str, Any]
    ) -> Manifest:
        """Write what stands beside the files, and return what the manifest says."""

    # ------------------------------------------------------------------------------------------- what may be another's

    def rows(self, batch: ImageBatch) -> Rows:
        """What is stored of a batch."""
        return Rows(batch.indices, self.latents(batch), self.source.labels[batch.indices])

    def stamp(self, file: PlannedFile) -> str:
        """What the images of a file are like: another stamp, and it is made again."""
        return self.source.stamp(file.indices)

    # ------------------------------------------------------------------------------------------------- what all share

    def latents(self, batch: ImageBatch) -> Tensor:
        """The stored values of a batch, on the CPU; raises `DataError` where they are not finite."""
        device = next(chain(self.codec.parameters(), self.codec.buffers()), batch.images).device
        found = self.values(batch.images.to(device).float() / 127.5 - 1, batch.indices)
        stored = found.to("cpu", DTYPES[self.dtype])
        broken = (~stored.isfinite()).flatten(1).any(1)
        if bool(broken.any()):
            name = shown(self.source.names[int(batch.indices[int(broken.nonzero()[0])])])
            raise DataError(
                f"The latents of {name} are not finite in {self.dtype}: encode with codec.dtype=float32 and "
                "dtype=float32, and check the codec's weights."
            )
        return stored

    def bytes_needed(self, file: PlannedFile) -> int:
        """Disk space of a file's latents."""
        values = math.prod(self.stored_shape(file.size)) * DTYPES[self.dtype].itemsize
        return len(file.indices) * (values + (4096 if file.file.endswith(".tar") else 8))  # names and headers, at most

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.codec.latent_channels or 3
