"""The tensors of a folder of safetensors files, one or several with an index, and what identifies such a folder.

A tensor, or the part of it that a process owns, is read from its file when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.plain import read_json
from flowanchor.checkpoints.consolidated import SUFFIX, named_dtype
from flowanchor.errors import CheckpointError
from flowanchor.weights import LazyWeights, local, own_part

CONFIG = "config.json"

Renaming = Callable[[list[str]], Mapping[str, str]]  # names in the files -> what they are called here


class FolderWeights(LazyWeights):
    """The tensors of a folder by name; `renaming`: where the files call them otherwise."""

    def __init__(self, folder: Path, renaming: Renaming | None = None) -> None:
        places = _places(folder)
        names = renaming(list(places)) if renaming is not None else {name: name for name in places}
        self._files = {ours: (places[theirs], theirs) for theirs, ours in names.items()}
        self._open: dict[Path, Any] = {}

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return named_dtype(self._slice(name).get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        file, theirs = self._files[name]
        return self._file(file).get_tensor(theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            part = own_part(target)
            local(target).copy_(self._slice(name)[part] if part else self[name])

    def _slice(self, name: str) -> Any:
        file, theirs = self._files[name]
        return self._file(file).get_slice(theirs)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


def digest_of(folders: Iterable[Path]) -> str:
    """sha256, hex, of what identifies such folders without reading tens of gigabytes: their configs, each file's
    header."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.iterdir() if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            if file.suffix == SUFFIX:
                digest.update(content.read(min(int.from_bytes(content.read(8), "little"), 1 << 26)))
            else:
                digest.update(content.read(1 << 20))
    return digest.hexdigest()


def _places(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    indices = sorted(folder.glob(f"*{SUFFIX}.index.json"))
    if indices:
        index = read_json(indices[0])
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not all(_is_name(file) for file in listed.values()):
            raise CheckpointError(f"{indices[0]} does not list files of its folder by tensor: download it again.")
        places = {name: folder / file for name, file in listed.items()}
    else:
        files = sorted(folder.glob(f"*{SUFFIX}"))
        if not files:
            raise CheckpointError(f"{folder} has a {CONFIG} and no weights (*{SUFFIX}): download them, all files.")
        places = {name: file for file in files for name in _opened(file).keys()}  # noqa: SIM118 - no dictionary
    absent = sorted({file.name for file in places.values() if not file.is_file()})
    if absent:
        raise CheckpointError(
            f"{folder} lacks {', '.join(absent[:3])}{' and others' if len(absent) > 3 else ''}, which its index lists: "
            "download them (a gated release asks you to accept its licence first)."
        )
    return places


def _is_name(file: object) -> bool:
    """Whether a text is the name of a file in the same folder, and leads nowhere else."""
    return isinstance(file, str) and file.endswith(SUFFIX) and PurePath(file).name == file and "\\" not in file


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(7) == b"version"
        reason = "it is a pointer of Git LFS, not the file itself" if pointer else str(error)
        raise CheckpointError(f"{path} cannot be read ({reason}): download it again.") from error
