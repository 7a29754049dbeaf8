"""One file of captioned latents, all of one size.

A file `captions-<n>.safetensors` holds `latents` [N, C, F, h, w], normalised, and the embeddings of all captions behind
each other: `text` [T, D], where caption k is `text[text_start[k]:text_start[k + 1]]` and sample i has the captions
`caption_start[i]` to `caption_start[i + 1]`. Its metadata lists names and captions. `negative.safetensors` holds `text`
[L, D] of the negative prompt.

A text that has more to it than tokens has a `text_<field>` for each: with a `text_start_<field>` one that has an entry
per token (`text_mask` [T], `text_tokens_2` [T', E]), without it one row per caption (`text_pooled` [K, P]).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.dtypes import FLOATS, WHOLE
from flowanchor.encoded.manifest import check_kinds
from flowanchor.errors import DataError

NEGATIVE = "negative.safetensors"
_VALUES = (*FLOATS, "BOOL")  # of a field: embeddings, masks


def stored(what: str, field: str) -> str:
    """The name of the tensor that holds `text` or `text_start` of a field; `tokens` needs none of its own."""
    return what if field == "tokens" else f"{what}_{field}"


@dataclass(frozen=True)
class _Field:
    """One field of all captions of a file; `start`: where each begins, None for one row per caption."""

    values: Any
    start: list[int] | None

    def of(self, caption: int) -> Tensor:
        first, last = (caption, caption + 1) if self.start is None else self.start[caption : caption + 2]
        found: Tensor = self.values[first:last]
        found = found[0] if self.start is None else found
        return found.float() if found.is_floating_point() else found


class CaptionFile:
    """One file, mapped into memory."""

    def __init__(self, path: Path, count: int | None = None) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise OSError("no such file")
            self._file = safe_open(path, framework="pt")
            self._latents = self._file.get_slice("latents")
            starts = {name: self._file.get_slice(name) for name in self._file.keys() if "_start" in name}
            kinds = [self._latents.get_dtype() in FLOATS, "text_start" in starts]
            kinds += [part.get_dtype() in WHOLE and len(part.get_shape()) == 1 for part in starts.values()]
            if not all(kinds) or len(self._latents.get_shape()) != 5:
                raise ValueError("tensors of other types or shapes")
            self.caption_start = self._file.get_tensor("caption_start").tolist()
            rows = self._latents.get_shape()[0]
            if len(self.caption_start) != rows + 1 or count not in (None, rows):
                raise ValueError(f"{rows} images, captions of {len(self.caption_start) - 1}")
            self._fields = {
                name.removeprefix("text").removeprefix("_") or "tokens": self._field(name)
                for name in sorted(self._file.keys())
                if name.startswith("text") and name not in starts
            }
            _check_starts(self.caption_start, self._captions, 1)
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): delete it and run encode.py again.") from error

    def _field(self, name: str) -> _Field:
        """Its tensor `text` or `text_<field>`; raises `ValueError` for one that cannot be that."""
        values, start = self._file.get_slice(name), name.replace("text", "text_start", 1)
        length, *others = values.get_shape()
        if values.get_dtype() not in _VALUES or (name == "text" and not others):
            raise ValueError("tensors of other types or shapes")
        if start not in self._file.keys():
            if length != self._captions:
                raise ValueError(f"{name} of {length} captions where there are {self._captions}")
            return _Field(values, None)
        starts = self._file.get_tensor(start).tolist()
        _check_starts(starts, length, 0)
        if len(starts) != self._captions + 1:
            raise ValueError(f"{start} of other captions")
        return _Field(values, starts)

    @property
    def _captions(self) -> int:
        """How many there are in all."""
        return int(self._file.get_slice("text_start").get_shape()[0]) - 1

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

    def text(self, row: int, caption: int) -> dict[str, Tensor]:
        """One of them by its fields: `tokens` [L, D] and what else there is; embeddings in float32."""
        number = self.caption_start[row] + caption
        return {name: field.of(number) for name, field in self._fields.items()}


def read_negative(folder: Path) -> dict[str, Tensor]:
    """The negative prompt by its fields, `tokens` [L, D] among them, as stored; raises `DataError`."""
    path = folder / NEGATIVE
    try:
        if not path.is_file():
            raise OSError("no such file")
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys() if name.startswith("text")}
            kinds = [part.get_dtype() in _VALUES for part in parts.values()]
            if "text" not in parts or not all(kinds) or len(parts["text"].get_shape()) < 2:
                raise ValueError("tensors of other types or shapes")
            return {name.removeprefix("text").removeprefix("_") or "tokens": file.get_tensor(name) for name in parts}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): run encode.py again, which completes the folder.") from error


def _check_starts(starts: list[int], end: int, step: int) -> None:
    """Raise `ValueError` unless the numbers go from 0 to `end`, each at least `step` above the one before."""
    if starts[:1] != [0] or starts[-1] != end or any(b - a < step for a, b in pairwise(starts)):
        raise ValueError("places of captions that do not fit together")
