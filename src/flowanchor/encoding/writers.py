"""Files of latents in two layouts, and files of latents with captions."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowanchor.base.files import save_tensors, write_json
from flowanchor.encoded.captions import stored
from flowanchor.encoded.manifest import Shard
from flowanchor.encoded.statistics import RunningStatistics
from flowanchor.errors import DataError
from flowanchor.text.base import is_sequence


class Rows(NamedTuple):
    """What a file gets of some images, in order."""

    indices: np.ndarray  # [B], of the source
    latents: Tensor  # [B, F, C, h, w], F: plain and mirrored, or plain alone; of captions [B, C, F, h, w], F: frames
    labels: np.ndarray  # [B]
    names: Sequence[str] = ()
    captions: Sequence[Sequence[str]] = ()
    texts: Sequence[Sequence[Any]] = ()  # of each caption a named tuple of `flowanchor.text.base`


class ShardWriter(ABC):
    """Takes the images of one file, in order, and writes them into a draft of it; `close` completes it.

    `measured` are the statistics of the values so far, where they are to be normalised by those of the whole set.
    """

    measured: RunningStatistics | None

    def __init__(self, draft: Path) -> None:
        self.draft, self.count, self.measured = draft, 0, None

    def add(self, rows: Rows) -> None:
        """The next images."""
        self.count += len(rows.indices)

    @abstractmethod
    def close(self) -> None:
        """Write what is held."""


class LatentWriter(ShardWriter):
    """Latents [F, C, h, w], and the statistics of the first `channels` of C: of moments, those of the mean."""

    measured: RunningStatistics

    def __init__(self, draft: Path, channels: int) -> None:
        super().__init__(draft)
        self.channels, self.measured = channels, RunningStatistics(channels)

    def add(self, rows: Rows) -> None:
        super().add(rows)
        self.measured.add(rows.latents[:, :, : self.channels].flatten(0, 1))


class SafetensorsWriter(LatentWriter):
    """The released layout: `latents`, `latents_flip` [N, C, h, w] and `labels` [N], held in memory until it is full."""

    def __init__(self, draft: Path, channels: int) -> None:
        super().__init__(draft, channels)
        self._rows: list[Rows] = []

    def add(self, rows: Rows) -> None:
        super().add(rows)
        self._rows.append(rows)

    def close(self) -> None:
        latents = torch.cat([rows.latents for rows in self._rows])
        labels = torch.from_numpy(np.concatenate([rows.labels for rows in self._rows]))
        content = {"latents": latents[:, 0].contiguous(), "labels": labels}
        if latents.shape[1] > 1:
            content["latents_flip"] = latents[:, 1].contiguous()
        save_tensors(self.draft, content, {"format": "pt"})  # one entry: their order is not fixed


class TarWriter(LatentWriter):
    """`<key>.npy` [F, C, h, w] and `<key>.cls` per image; the key is its index in the source."""

    def __init__(self, draft: Path, channels: int) -> None:
        super().__init__(draft, channels)
        self._tar = tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, rows: Rows) -> None:
        super().add(rows)
        parts = zip(rows.indices.tolist(), rows.latents.numpy(), rows.labels.tolist(), strict=True)
        for index, values, label in parts:
            buffer = io.BytesIO()
            np.save(buffer, values, allow_pickle=False)
            self._member(f"{index:08d}.npy", buffer.getvalue())
            self._member(f"{index:08d}.cls", str(label).encode())

    def _member(self, name: str, content: bytes) -> None:
        """With no time, owner or permissions of this machine, so that the same images make the same file."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._tar.addfile(header, io.BytesIO(content))

    def close(self) -> None:
        self._tar.close()


class CaptionWriter(ShardWriter):
    """Latents [N, C, F, h, w] with the embeddings of their captions (`flowanchor.encoded.captions`), held in memory."""

    def __init__(self, draft: Path) -> None:
        super().__init__(draft)
        self._rows: list[Rows] = []

    def add(self, rows: Rows) -> None:
        super().add(rows)
        self._rows.append(rows)

    def close(self) -> None:
        samples = [sample for rows in self._rows for sample in rows.texts]
        texts = [text for sample in samples for text in sample]
        content = {
            "latents": torch.cat([rows.latents for rows in self._rows]),
            "caption_start": _starts(samples),
        }
        for field in texts[0]._fields:
            values = [getattr(text, field) for text in texts]
            if is_sequence(field):
                content[stored("text", field)] = torch.cat(values)
                content[stored("text_start", field)] = _starts(values)
            else:
                content[stored("text", field)] = torch.stack(values)
        names = [name for rows in self._rows for name in rows.names]
        captions = [list(found) for rows in self._rows for found in rows.captions]
        described = json.dumps({"names": names, "captions": captions})
        save_tensors(self.draft, content, {"samples": described})  # one entry: their order is not fixed


def _starts(parts: Sequence[Sized]) -> Tensor:
    """Where each of some parts begins that lie behind each other, and where the last one ends."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64))


def open_writer(layout: str, draft: Path, channels: int) -> LatentWriter:
    return SafetensorsWriter(draft, channels) if layout == "safetensors" else TarWriter(draft, channels)


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
