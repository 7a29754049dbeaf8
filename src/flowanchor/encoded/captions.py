"""One file of captioned latents, all of one size, and the manifest of a set of them.

A file `captions-<n>.safetensors` holds `latents` [N, C, F, h, w], normalised, and the embeddings of all captions behind
each other: `text` [T, D], where caption k is `text[text_start[k]:text_start[k + 1]]` and sample i has the captions
`caption_start[i]` to `caption_start[i + 1]`. Its metadata lists names and captions. `negative.safetensors` holds `text`
[L, D] of the negative prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.files import replacing, save_tensors, sha256, write_json
from flowanchor.base.plain import read_json
from flowanchor.base.reading import shown
from flowanchor.data.latent_files import FLOATS, WHOLE
from flowanchor.encoded.manifest import MANIFEST, Shard, check_kinds, check_shards
from flowanchor.encoding.writers import disk_space
from flowanchor.errors import DataError

FORMAT = 1
NEGATIVE = "negative.safetensors"


@dataclass(frozen=True)
class CaptionManifest:
    """Written last, when a set is complete."""

    count: int
    shape: tuple[int, int]  # channels and frames of a latent
    text_width: int
    shards: tuple[Shard, ...]
    sizes: tuple[tuple[int, int], ...]  # of the latents in each file: height, width
    codec: dict[str, Any]  # name, digest
    text_encoder: dict[str, Any]  # name, digest, settings
    negative: str  # the negative prompt
    unreadable: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    kind: str = "captions"
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into the folder, in one move."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> CaptionManifest | None:
        """That of a folder, None where it has none; raises `DataError` for another kind or a damaged one."""
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            content = read_json(path, DataError)
            if content.get("kind") != "captions":
                raise DataError(f"{path} is that of another kind of data: give a folder of encode.py data=captions.")
            found = {key: value for key, value in content.items() if key in {f.name for f in fields(cls)}}
            found["shards"] = tuple(Shard(**shard) for shard in found["shards"])
            found["sizes"] = tuple(tuple(size) for size in found["sizes"])
            found["shape"], found["unreadable"] = tuple(found["shape"]), tuple(found["unreadable"])
            manifest = cls(**found)
            manifest._check()
            return manifest
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({shown(error)[:200]}): run encode.py again, which completes the folder."
            ) from error

    def _check(self) -> None:
        """Raise `ValueError` where a value is of another kind than it has to be."""
        check_kinds(str, self.negative, *self.unreadable)
        check_kinds(int, self.count, self.text_width, *self.shape, *(side for size in self.sizes for side in size))
        check_kinds(dict, self.codec, self.text_encoder, self.source)
        check_shards(self.shards)
        if len(self.shape) != 2 or len(self.sizes) != len(self.shards) or any(len(size) != 2 for size in self.sizes):
            raise ValueError("its shape or its sizes are none")


def write_file(
    path: Path, latents: Tensor, embeddings: Sequence[Sequence[Tensor]], names: Sequence[str], captions: Sequence[Any]
) -> Shard:
    """Write one file in one move: latents [N, C, F, h, w], for each sample the embeddings [L, D] of its captions."""
    texts = [text for sample in embeddings for text in sample]
    content = {
        "latents": latents.contiguous(),
        "text": torch.cat(list(texts)),
        "text_start": _starts([len(text) for text in texts]),
        "caption_start": _starts([len(sample) for sample in embeddings]),
    }
    described = json.dumps({"names": list(names), "captions": [list(c) for c in captions]})
    with disk_space(path), replacing(path) as draft:
        save_tensors(draft, content, {"samples": described})  # one entry: their order is not fixed
        digest, size = sha256(draft), draft.stat().st_size
    return Shard(path.name, len(latents), size, digest)


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class CaptionFile:
    """One file, mapped into memory."""

    def __init__(self, path: Path, count: int | None = None) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise OSError("no such file")
            self._file = safe_open(path, framework="pt")
            self._latents, self._text = self._file.get_slice("latents"), self._file.get_slice("text")
            starts = [self._file.get_slice(name) for name in ("text_start", "caption_start")]
            kinds = [part.get_dtype() in FLOATS for part in (self._latents, self._text)]
            kinds += [part.get_dtype() in WHOLE for part in starts]
            sides = [len(part.get_shape()) for part in (self._latents, self._text, *starts)]
            if not all(kinds) or sides != [5, 2, 1, 1]:
                raise ValueError("tensors of other types or shapes")
            self.text_start = self._file.get_tensor("text_start").tolist()
            self.caption_start = self._file.get_tensor("caption_start").tolist()
            rows = self._latents.get_shape()[0]
            if len(self.caption_start) != rows + 1 or count not in (None, rows):
                raise ValueError(f"{rows} images, captions of {len(self.caption_start) - 1}")
            _check_starts(self.text_start, self._text.get_shape()[0], 0)
            _check_starts(self.caption_start, len(self.text_start) - 1, 1)
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): delete it and run encode.py again.") from error

    def latents(self, rows: Sequence[int]) -> Tensor:
        """[B, C, F, h, w], float32."""
        return torch.cat([self._latents[row : row + 1] for row in rows]).float()

    def texts(self) -> list[list[str]]:
        """The captions of every sample."""
        try:
            found = json.loads(self._file.metadata()["samples"])["captions"]
            for captions in found:
                check_kinds(list, captions)
                check_kinds(str, *captions)
            if [len(captions) for captions in found] != [b - a for a, b in pairwise(self.caption_start)]:
                raise ValueError("captions of other images")
            return list(found)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{self.path} holds no captions ({error}): delete it and run encode.py again.") from error

    def captions(self, row: int) -> int:
        """How many captions a sample has."""
        return int(self.caption_start[row + 1] - self.caption_start[row])

    def text(self, row: int, caption: int) -> Tensor:
        """Embeddings [L, D] of one of them, float32."""
        number = self.caption_start[row] + caption
        found: Tensor = self._text[self.text_start[number] : self.text_start[number + 1]]
        return found.float()


def read_negative(folder: Path) -> Tensor:
    """The embeddings [L, D] of the negative prompt, as stored; raises `DataError`."""
    path = folder / NEGATIVE
    try:
        if not path.is_file():
            raise OSError("no such file")
        with safe_open(path, framework="pt") as file:
            if (part := file.get_slice("text")).get_dtype() not in FLOATS or len(part.get_shape()) != 2:
                raise ValueError("tensors of other types or shapes")
            return file.get_tensor("text")
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): run encode.py again, which completes the folder.") from error


def _check_starts(starts: list[int], end: int, step: int) -> None:
    """Raise `ValueError` unless the numbers go from 0 to `end`, each at least `step` above the one before."""
    if starts[:1] != [0] or starts[-1] != end or any(b - a < step for a, b in pairwise(starts)):
        raise ValueError("places of captions that do not fit together")
