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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowanchor.base.plain import read_json
from flowanchor.data.latent_files import FLOATS
from flowanchor.encoding.writers import disk_space, file_sha256
from flowanchor.errors import DataError
from flowanchor.latents.manifest import MANIFEST, Shard

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
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)

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
            return cls(**found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}): run encode.py again, which completes the folder.") from error


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
    partial = path.with_name(f"{path.name}.partial")
    with disk_space(path):
        partial.touch()
        mode = partial.stat().st_mode
        save_file(content, partial, metadata={"samples": described})  # one entry: their order is not fixed
        partial.chmod(mode)
        digest, size = file_sha256(partial), partial.stat().st_size
        partial.replace(path)
    return Shard(path.name, len(latents), size, digest)


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class CaptionFile:
    """One file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._latents, self._text = self._file.get_slice("latents"), self._file.get_slice("text")
            self.text_start = self._file.get_tensor("text_start").tolist()
            self.caption_start = self._file.get_tensor("caption_start").tolist()
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}): delete it and run encode.py again.") from error
        if not {self._latents.get_dtype(), self._text.get_dtype()} <= set(FLOATS):
            raise DataError(f"{path} holds other numbers than floating-point ones: delete it and run encode.py again.")

    def latents(self, rows: Sequence[int]) -> Tensor:
        """[B, C, F, h, w], float32."""
        return torch.cat([self._latents[row : row + 1] for row in rows]).float()

    def texts(self) -> list[list[str]]:
        """The captions of every sample."""
        return list(json.loads(self._file.metadata()["samples"])["captions"])

    def captions(self, row: int) -> int:
        """How many captions a sample has."""
        return int(self.caption_start[row + 1] - self.caption_start[row])

    def text(self, row: int, caption: int) -> Tensor:
        """Embeddings [L, D] of one of them, float32."""
        number = self.caption_start[row] + caption
        found: Tensor = self._text[self.text_start[number] : self.text_start[number + 1]]
        return found.float()
