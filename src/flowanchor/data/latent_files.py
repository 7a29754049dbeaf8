"""Files of latents in the released layout, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.dtypes import FLOATS, WHOLE
from flowanchor.base.reading import shown
from flowanchor.base.walk import is_hidden
from flowanchor.errors import DataError

LATENTS, FLIPPED, LABELS = "latents", "latents_flip", "labels"


class LatentFiles:
    """The rows of all `*.safetensors` files of a folder, in the order of names, as one array.

    A file holds `latents` [N, C, h, w], `latents_flip` of the same shape and `labels` [N]. They are mapped once per
    process and read where they lie.

    Attributes:
        shape: of one row: C, h, w.
        labels: [N of all files] int64.
        flips: whether every file holds `latents_flip`.

    Raises:
        DataError: no files, a file that is truncated or lacks a key, files of different shapes.
    """

    def __init__(self, root: Path, expected: Sequence[str] = ()) -> None:
        self.paths = sorted(p for p in root.glob("*.safetensors") if p.is_file() and not is_hidden(p.name))
        missing = sorted(set(expected) - {path.name for path in self.paths})
        if missing:
            raise DataError(f"{root / missing[0]} is gone ({len(missing)} of {len(expected)}): copy it again.")
        if not self.paths:
            where = "are no .safetensors files in" if root.is_dir() else "is no folder"
            raise DataError(f"There {where} {root}: encode images into it by python src/encode.py out={root}.")
        self.flips = True
        shapes, labels = {}, []
        for path in self.paths:
            shapes[path], label, flips = _describe(path)
            labels.append(label)
            self.flips = self.flips and flips
        self.shape = shapes[self.paths[0]]
        for path, shape in shapes.items():
            if shape != self.shape:
                raise DataError(f"{path} holds latents of {shape} and {self.paths[0].name} of {self.shape}: sort them.")
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise DataError(
                f"{self.paths[0]} holds no latents: encode images into it by python src/encode.py out={root}."
            )
        self._ends = np.cumsum([len(label) for label in labels])
        self._mapped: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """File and sample, for messages."""
        file, sample = self._place(np.array([row]))
        return f"Sample {sample[0]} of {self.paths[file[0]]}"

    def read(self, rows: np.ndarray, flipped: np.ndarray) -> Tensor:
        """float32 [B, C, h, w]; `flipped` [B]: from `latents_flip`."""
        if self._mapped is None:
            self._mapped = [_map(path, self.flips) for path in self.paths]
        out = torch.empty(len(rows), *self.shape)
        files, samples = self._place(rows)
        places = zip(files.tolist(), samples.tolist(), flipped.astype(int).tolist(), strict=True)
        for row, (file, sample, view) in enumerate(places):
            out[row].copy_(self._mapped[file][view][sample])
        return out

    def _place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        files = np.searchsorted(self._ends, rows, side="right")
        return files, rows - np.where(files > 0, self._ends[files - 1], 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # each process maps the files itself


def _describe(path: Path) -> tuple[tuple[int, ...], np.ndarray, bool]:
    """Shape of a row, labels, and whether there are mirrored latents."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for key in (LATENTS, LABELS):
                if key not in keys:
                    raise DataError(
                        f"{path} holds no '{key}' ({shown(', '.join(sorted(keys)))[:200]}): encode the images again."
                    )
            for key, types in ((LATENTS, FLOATS), (FLIPPED, FLOATS), (LABELS, WHOLE)):
                if key in keys and (found := file.get_slice(key).get_dtype()) not in types:
                    raise DataError(
                        f"{path} holds '{key}' of type {found}, not {' or '.join(types)}: encode them again."
                    )
            shape = tuple(file.get_slice(LATENTS).get_shape())
            labels = file.get_tensor(LABELS).numpy().astype(np.int64).reshape(-1)
            if FLIPPED in keys and tuple(file.get_slice(FLIPPED).get_shape()) != shape:
                raise DataError(f"{path}: '{FLIPPED}' has another shape than '{LATENTS}': encode the images again.")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is truncated or no safetensors file ({error}): copy or encode it again.") from error
    if len(shape) != 4 or shape[0] != len(labels):
        raise DataError(f"{path} holds latents of {shape} and {len(labels)} labels: encode the images again.")
    return shape[1:], labels, FLIPPED in keys


def _map(path: Path, flips: bool) -> tuple[Tensor, Tensor]:
    """The plain and the mirrored latents; safetensors maps the file, so nothing is read yet."""
    with safe_open(path, framework="pt") as file:
        plain = file.get_tensor(LATENTS)
        return plain, file.get_tensor(FLIPPED) if flips else plain
