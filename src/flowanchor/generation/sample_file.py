"""Generated images on disk, written as they come."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from flowanchor.base.files import replacing


class SampleFile:
    """Collects uint8 chunks [b, H, W, C] into `images` of an .npz, next to `labels`, one chunk in memory at a time.

    As a context manager; the .npz appears when the block ends without an error. Several processes, and a process that
    goes on after another, use `write`, `flush` and, once all images are there, `finish` instead: the images are
    meanwhile in `draft`.
    """

    def __init__(self, path: Path, count: int, labels: np.ndarray | None) -> None:
        self.path, self.count, self.labels = path, count, labels
        self.draft = path.with_suffix(".images.npy")
        self._file: BinaryIO | None = None
        self._begin = 0  # of the images in the draft
        self._written = 0

    def add(self, chunk: Tensor) -> None:
        """Append a chunk."""
        self.write(self._written, chunk)
        self._written += len(chunk)

    def write(self, start: int, chunk: Tensor) -> None:
        """Images start, start + 1, ..."""
        if self._file is None:
            self._open(tuple(chunk.shape[1:]))
        assert self._file is not None
        self._file.seek(self._begin + start * chunk[0].numel())
        self._file.write(chunk.contiguous().numpy().tobytes())

    def flush(self) -> None:
        """Hand everything over to the operating system: what was written survives the process."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Leave the draft as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Turn the draft into the .npz."""
        self.close()
        labels = np.full(self.count, -1, dtype=np.int64) if self.labels is None else self.labels
        with replacing(self.path) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.write(self.draft, "images.npy")
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, labels)
        self.draft.unlink()

    def _open(self, shape: tuple[int, ...]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not "w+b": another process may have begun. All of them write the same header.
        self._file = os.fdopen(os.open(self.draft, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, {**header, "shape": (self.count, *shape)})
        self._begin = self._file.tell()
        self._file.truncate(self._begin + self.count * int(np.prod(shape)))

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        if kind is None and self._written == self.count:
            self.finish()
        else:
            self.close()
            self.draft.unlink()
