"""The tensors of a folder with Wan's weights, of diffusers or of the release, by their names in diffusers.

There are safetensors files, one or several with an index; the key layout of the release is renamed by diffusers' own
table. A tensor, or the part of it that a process owns, is read from its file when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
OURS, THEIRS = "r_embedder.", "condition_embedder.delta_embedder."  # what embeds the end, here and in diffusers


class WanWeights(LazyWeights):
    """The tensors of such a folder by their names in diffusers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files = folder, _names(folder)
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


def diffusers_names(names: list[str]) -> dict[str, str]:
    """Names in either layout -> what diffusers calls them."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers  # takes seconds to import

    if any("condition_embedder." in name for name in names):
        return {name: name for name in names}
    renamed = convert_wan_transformer_to_diffusers({name: name for name in names})  # moves values, looks at none
    return {theirs: ours for ours, theirs in renamed.items()}


def _names(folder: Path) -> dict[str, tuple[Path, str]]:
    """diffusers' name of each tensor -> its file and its name there."""
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
    names = diffusers_names(list(places))
    return {name.replace(THEIRS, OURS, 1): (places[theirs], theirs) for theirs, name in names.items()}


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
