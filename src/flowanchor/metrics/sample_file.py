"""Generated images on disk, written as they come."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from torch import Tensor


class SampleFile:
    """Collects uint8 chunks [b, H, W, C] into `images` of an .npz, next to `labels`, one chunk in memory at a time.

    As a context manager; the .npz appears when the block ends without an error.
    """

    def __init__(self, path: Path, count: int, labels: np.ndarray | None) -> None:
        self.path, self.count, self.labels = path, count, labels
        self._draft = path.with_suffix(".images.npy")
        self._images: np.memmap | None = None
        self._written = 0

    def add(self, chunk: Tensor) -> None:
        """Append a chunk."""
        if self._images is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._images = np.lib.format.open_memmap(
                self._draft, mode="w+", dtype=np.uint8, shape=(self.count, *chunk.shape[1:])
            )
        self._images[self._written : self._written + len(chunk)] = chunk.numpy()
        self._written += len(chunk)

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._images is None:
            return
        self._images.flush()
        self._images = None
        if kind is None and self._written == self.count:
            labels = np.full(self.count, -1, dtype=np.int64) if self.labels is None else self.labels
            with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                archive.write(self._draft, "images.npy")
                with archive.open("labels.npy", "w") as file:
                    np.lib.format.write_array(file, labels)
        self._draft.unlink()
