"""One file of captioned latents, all of one size.

A file `captions-<n>.safetensors` holds `latents` [N, C, F, h, w], normalised, and the embeddings of all captions behind
each other: `text` [T, D], where caption k is `text[text_start[k]:text_start[k + 1]]` and sample i has the captions
`caption_start[i]` to `caption_start[i + 1]`. Its metadata lists names and captions. `negative.safetensors` holds `text`
[L, D] of the negative prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.dtypes import FLOATS, WHOLE
from flowanchor.encoded.manifest import check_kinds
from flowanchor.errors import DataError

NEGATIVE = "negative.safetensors"


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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's latents: C, F, h, w."""
        return tuple(self._latents.get_shape()[1:])

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
