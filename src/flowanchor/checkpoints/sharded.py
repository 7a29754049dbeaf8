"""Sharded checkpoints: a folder into which every process writes its part, and that any number of processes reads.

The tensors go through `torch.distributed.checkpoint`, under names that do not depend on how they were sharded:

    state_dict/<name>    ema/<profile>/<name>    optimizer_states/<i>/<index of the parameter>/<name>

and everything else goes into `meta.pt`, in the form of an ordinary checkpoint file. Nothing in a folder is unpickled
without restriction.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from flowanchor.base.files import flush, save_torch
from flowanchor.base.seal import sums_of, write_sums
from flowanchor.base.torch_files import read_torch
from flowanchor.checkpoints.sharded_folder import INDEX, META
from flowanchor.checkpoints.sharded_folder import is_sharded as is_sharded
from flowanchor.errors import CheckpointError
from flowanchor.weights import LazyWeights, Renamed

Barrier = Callable[[], None]
Gather = Callable[[Any], list[Any]]  # a value of each process -> the values of all of them

# What an index of torch.distributed.checkpoint is made of.
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_CLASSES = {
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo",
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- reading


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _INDEX_MODULES and name in _INDEX_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if (module, name) in (("collections", "OrderedDict"), ("pathlib", "PosixPath")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"an index names {module}.{name}")


class _Reader(FileSystemReader):
    """Reads with an index that was unpickled safely, once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_index(self.folder, (self.folder / INDEX).stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_index(folder: Path, changed: int) -> Metadata:
    try:
        with (folder / INDEX).open("rb") as file:
            found = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint that can be read safely (its index holds more than names and shapes, or is "
            "cut off): give a checkpoint written by flowanchor."
        ) from error
    if not isinstance(found, Metadata) or not _is_own(found, folder):
        raise CheckpointError(f"{folder} has no index of tensors: give a checkpoint written by flowanchor.")
    return found


def _is_own(index: Metadata, folder: Path) -> bool:
    """Whether an index tells names and shapes of tensors, and where in the files of its folder they lie."""
    places = getattr(index, "storage_data", None)
    entries = getattr(index, "state_dict_metadata", None)
    if not isinstance(places, dict) or not isinstance(entries, dict):
        return False
    for place in places.values():
        file = getattr(place, "relative_path", None)
        span = (getattr(place, "offset", None), getattr(place, "length", None))
        if not isinstance(file, str) or PurePath(file).name != file or not (folder / file).is_file():
            return False
        if getattr(place, "transform_descriptors", None) or not all(type(n) is int and n >= 0 for n in span):
            return False
    claimed = 0
    for name, entry in entries.items():
        if not (isinstance(name, str) and name.isprintable()):
            return False
        if isinstance(entry, TensorStorageMetadata):
            size, dtype = getattr(entry, "size", None), getattr(getattr(entry, "properties", None), "dtype", None)
            if not (isinstance(size, torch.Size) and isinstance(dtype, torch.dtype)):
                return False
            claimed += size.numel() * dtype.itemsize
    files = {place.relative_path for place in places.values()}
    return claimed <= sum((folder / file).stat().st_size for file in files)


class FolderTensors(LazyWeights):
    """The tensors of a sharded checkpoint, by their full names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = _Reader(folder).read_metadata().state_dict_metadata
        self._entries = {name: entry for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}

    def shape(self, name: str) -> torch.Size:
        return self._entries[name].size

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].properties.dtype

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.copy_into({name: whole})
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            if name not in self._entries or self.shape(name) != target.shape:
                raise CheckpointError(f"{self._folder} has no tensor {name} of shape {tuple(target.shape)}.")
        if not targets:
            return
        wanted = {name: target.detach() for name, target in targets.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            # Every process reads what it owns; nothing is agreed upon or sent.
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            try:
                dcp.load(wanted, storage_reader=_Reader(self._folder), planner=planner, no_dist=True)
            except (Exception, CheckpointException) as error:  # the latter is not one of the former
                raise CheckpointError(
                    f"{self._folder} is damaged: its tensors cannot be read as its index lists them; copy it again."
                ) from error


def read_sharded(folder: Path) -> dict[str, Any]:
    """The content of a sharded checkpoint in the form of an ordinary one, its tensors not read yet.

    Raises what `torch.load` raises for a `meta.pt` that is damaged or unsafe.
    """
    content = read_torch(folder / META, mmap=False)
    if not isinstance(content, dict):
        return {}
    tensors = FolderTensors(folder)
    content["state_dict"] = Renamed(tensors, "state_dict/")
    profiles = content.pop("ema_profiles", None)
    if profiles:
        content["ema"] = {profile: Renamed(tensors, f"ema/{profile}/") for profile in profiles}
    for i, state in enumerate(content.get("optimizer_states", [])):
        state["tensors"] = Renamed(tensors, f"optimizer_states/{i}/")
    return content


def read_whole(folder: Path) -> dict[str, Any]:
    """The content of a sharded checkpoint with all its tensors in memory: an ordinary checkpoint."""
    content = read_sharded(folder)
    content["state_dict"] = dict(content["state_dict"])
    if "ema" in content:
        content["ema"] = {profile: dict(weights) for profile, weights in content["ema"].items()}
    for state in content.get("optimizer_states", []):
        for name, tensor in state.pop("tensors").items():
            index, _, entry = name.partition("/")
            state["state"].setdefault(int(index), {})[entry] = tensor
    return content


# -------------------------------------------------------------------------------------------------------------- writing


def alone(value: Any) -> list[Any]:
    """What one process gathers."""
    return [value]


def nobody() -> None:
    """What one process waits for."""


def write_sharded(
    folder: Path, checkpoint: dict[str, Any], rank: int = 0, gather: Gather = alone, barrier: Barrier = nobody
) -> None:
    """Write a checkpoint whose tensors are sharded; every process calls it, the first one writes `meta.pt`.

    Args:
        folder: a new folder, the same on every process.
        checkpoint: in the form of an ordinary checkpoint, with `DTensor`s in it.
        rank, gather, barrier: which of the processes this is, and how it meets the others; by default it is alone.
    """
    content = dict(checkpoint)
    tensors: dict[str, Any] = {f"state_dict/{name}": value for name, value in content.pop("state_dict").items()}
    averages = content.pop("ema", None)
    if averages:
        content["ema_profiles"] = list(averages)
        for profile, average in averages.items():
            tensors.update({f"ema/{profile}/{name}": value for name, value in average.items()})
    if "optimizer_states" in content:
        states = content["optimizer_states"]
        content["optimizer_states"] = [_split_optimizer(i, state, tensors) for i, state in enumerate(states)]
    writer = FileSystemWriter(folder, single_file_per_rank=True)
    dcp.save(tensors, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    sums = gather(sums_of(sorted(folder.glob(f"__{rank}_*")) + ([folder / INDEX] if rank == 0 else [])))
    if rank == 0:
        write_sums(folder, {name: entry for part in sums for name, entry in part.items()})
        save_torch(folder / META, content)  # last: it says that the folder is complete
        flush(folder)
    barrier()


def _split_optimizer(i: int, state: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Move the tensors of an optimizer's state to `tensors`; what remains is plain."""
    plain: dict[int, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer_states/{i}/{index}/{name}"] = value
            else:
                plain.setdefault(index, {})[name] = value
    return {"state": plain, "param_groups": state["param_groups"]}
