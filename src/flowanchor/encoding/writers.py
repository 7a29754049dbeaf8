"""Files of latents in the two layouts; nothing is ever seen under its final name before it is whole."""

from __future__ import annotations

import errno
import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.files import flush, replace, save_tensors, sha256, unfinished, write_json
from flowanchor.encoded.manifest import Shard
from flowanchor.errors import DataError

_HEADERS = 4096  # bytes of names and headers per image of a tar, at most


class ShardWriter(ABC):
    """Takes the images of one file, in order; `finish` puts it in its place."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, unfinished(path)
        self.count = 0

    @abstractmethod
    def add(self, indices: np.ndarray, latents: Tensor, labels: np.ndarray) -> None:
        """Images `indices`, latents [B, F, C, h, w] (F: plain and mirrored, or plain alone), labels [B]."""

    @abstractmethod
    def _write(self) -> None:
        """Complete `partial`."""

    def finish(self) -> Shard:
        """Write, move into place, and describe the file."""
        with disk_space(self.path):
            self._write()
            digest, size = sha256(self.partial), self.partial.stat().st_size
            flush(self.partial)
            replace(self.partial, self.path)
        return Shard(self.path.name, self.count, size, digest)


class SafetensorsWriter(ShardWriter):
    """The released layout: `latents`, `latents_flip` [N, C, h, w] and `labels` [N], held in memory until it is full."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._latents: list[Tensor] = []
        self._labels: list[np.ndarray] = []

    def add(self, indices: np.ndarray, latents: Tensor, labels: np.ndarray) -> None:
        self._latents.append(latents)
        self._labels.append(labels)
        self.count += len(indices)

    def _write(self) -> None:
        latents, labels = torch.cat(self._latents), torch.from_numpy(np.concatenate(self._labels))
        content = {"latents": latents[:, 0].contiguous(), "labels": labels}
        if latents.shape[1] > 1:
            content["latents_flip"] = latents[:, 1].contiguous()
        save_tensors(self.partial, content, {"format": "pt"})  # one entry: their order is not fixed


class TarWriter(ShardWriter):
    """`<key>.npy` [F, C, h, w] and `<key>.cls` per image; the key is its index in the source."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with disk_space(path):
            self._tar = tarfile.open(self.partial, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, indices: np.ndarray, latents: Tensor, labels: np.ndarray) -> None:
        with disk_space(self.path):
            for index, values, label in zip(indices.tolist(), latents.numpy(), labels.tolist(), strict=True):
                buffer = io.BytesIO()
                np.save(buffer, values, allow_pickle=False)
                self._member(f"{index:08d}.npy", buffer.getvalue())
                self._member(f"{index:08d}.cls", str(label).encode())
        self.count += len(indices)

    def _member(self, name: str, content: bytes) -> None:
        """With no time, owner or permissions of this machine, so that the same images make the same file."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._tar.addfile(header, io.BytesIO(content))

    def _write(self) -> None:
        self._tar.close()


def open_writer(layout: str, path: Path) -> ShardWriter:
    return SafetensorsWriter(path) if layout == "safetensors" else TarWriter(path)


def bytes_needed(images: int, shape: tuple[int, ...], dtype: str, layout: str) -> int:
    """Disk space of so many images with stored values of this shape [F, C, h, w]."""
    values = int(np.prod(shape)) * DTYPES[dtype].itemsize
    return images * (values + (_HEADERS if layout == "webdataset" else 8))


def write_index(folder: Path, name: str, shards: list[Shard]) -> None:
    """`index.json`: the list of shards as webdataset's `wids` reads it."""
    content: dict[str, Any] = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": name,
        "shardlist": [{"url": s.file, "nsamples": s.count, "filesize": s.bytes} for s in shards],
    }
    write_json(folder / "index.json", content)


@contextmanager
def disk_space(path: Path) -> Iterator[None]:
    """A full disk in one sentence; what was finished before stays."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"The disk is full: {path} could not be written. Make room and run the same command again: the files "
                "that are finished stay, and it goes on from there."
            ) from error
        raise
