"""The content of a checkpoint, and the one set of weights in it that a name stands for."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.base.torch_files import read_torch
from flowanchor.checkpoints.consolidated import SUFFIX
from flowanchor.checkpoints.description import checked_content
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.format import Choices
from flowanchor.checkpoints.formats import in_place
from flowanchor.checkpoints.huggingface import read_safetensors
from flowanchor.checkpoints.meaning import check_meaning
from flowanchor.checkpoints.sharded_folder import is_sharded
from flowanchor.ema_posthoc import Owner, synthesise
from flowanchor.errors import CheckpointError, FlowAnchorError
from flowanchor.interfaces import Backbone
from flowanchor.weights import Joined, Renamed


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of ours, read without unpickling foreign code; raises `CheckpointError` else.

    Tensors are mapped from the file, or read from the folder, when they are used.
    """
    file = find_checkpoint(path)
    try:
        content = _read(file)
    except (PermissionError, FlowAnchorError):
        raise
    except Exception as error:  # damaged files make PyTorch raise almost anything
        pickled = zipfile.is_zipfile(file) and isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if pickled else "it is no complete file of torch.save"
        raise CheckpointError(
            f"{file} is not a checkpoint that can be read safely ({reason}): give a .ckpt file written by flowanchor"
            f"{_advice(file)}."
        ) from error
    meta = content.get("flowanchor") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        raise CheckpointError(
            f"{file} was not written by flowanchor (no 'flowanchor' entry): give a .ckpt file of a flowanchor run"
            f"{_advice(file)}."
        )
    return {**content, **checked_content(content, file)}


def _read(file: Path) -> Any:
    format = in_place(file)
    if format is not None:
        return format.read(file, Choices()).as_checkpoint()
    if file.is_dir():
        from flowanchor.checkpoints.sharded import read_sharded  # its library takes a second to import

        return read_sharded(file)
    if file.suffix == SUFFIX:
        return read_safetensors(file)
    return read_torch(file)


def _advice(file: Path) -> str:
    released = file.suffix in (".pt", ".pth", SUFFIX) or (file.is_dir() and not is_sharded(file))
    command = f"python src/convert.py checkpoint={file} output=NAME{SUFFIX}"
    return f"; if it is a released checkpoint, convert it first: {command}" if released else ""


def is_ours(path: str | Path) -> bool:
    """Whether a path leads to what looks like a checkpoint of ours; raises `CheckpointError` where nothing is."""
    file = find_checkpoint(path)
    try:
        content = _read(file)
    except PermissionError:
        raise
    except Exception:  # see read_checkpoint
        return is_sharded(file) or in_place(file) is not None  # a damaged file is foreign until proven ours
    return isinstance(content, dict) and isinstance(content.get("flowanchor"), dict)


def select_weights(content: dict[str, Any], ema: str | None, file: Path) -> tuple[str, Mapping[str, Tensor]]:
    """The student's weights that a name stands for, and that name."""
    profiles: dict[str, Mapping[str, Tensor]] = content.get("ema") or {}
    ema = None if ema is None else str(ema)  # a command line may bring a number
    if ema is not None and ema.startswith("posthoc:"):
        try:
            width = float(ema.partition(":")[2])
        except ValueError as error:
            raise CheckpointError(f"There is no EMA profile '{ema}': write for example posthoc:0.15.") from error
        owner = Owner.of(file, content)
        return ema, synthesise(file.parent.parent / "ema_snapshots", width, int(content["flowanchor"]["step"]), owner)
    if ema is None and profiles:
        ema = next(iter(profiles))
    raw = content["state_dict"]
    if (ema is None or ema == "none") and len(raw):  # a consolidated file may hold an average alone
        return "none", Renamed(raw, "student.")
    if ema not in profiles:
        known = ", ".join([*profiles, *(["none"] if len(raw) else [])])
        raise CheckpointError(f"{file} holds no EMA profile '{ema}': choose one of {known}.")
    return ema, profiles[ema]


def weights_at(
    path: str | Path | Mapping[str, str], ema: str | None = None, student: Backbone | None = None
) -> tuple[Mapping[str, Tensor], str]:
    """The weights of a checkpoint, or of one for each part, and how to call them in a message.

    `student`: who takes them; raises `ConfigError` where they mean something else to it (`Backbone.meaning`).
    """
    paths = {f"{part}.": where for part, where in path.items()} if isinstance(path, Mapping) else {"": path}
    files = {prefix: find_checkpoint(where) for prefix, where in paths.items()}
    parts = {}
    for prefix, file in files.items():
        content = read_checkpoint(file)
        parts[prefix] = select_weights(content, ema, file)[1]
        if student is not None:
            check_meaning(student, content["flowanchor"]["config"].get("backbone") or {}, parts[prefix], file)
    return parts[""] if "" in parts else Joined(parts), " and ".join(map(str, files.values()))
