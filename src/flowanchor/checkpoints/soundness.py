"""Checkpoints with holes: noticed before a run goes on from one, or one is published.

Pages that never reached the disk before a power cut, a copy that stopped, a flipped bit: the weights would still load,
and be others. Everything that flowanchor writes carries sums (`flowanchor.base.seal`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flowanchor.base.files import remove, superseded
from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.base.seal import check_folder, check_seal, check_zip
from flowanchor.base.torch_files import read_torch
from flowanchor.checkpoints.consolidated import SUFFIX
from flowanchor.checkpoints.formats import in_place
from flowanchor.checkpoints.read import is_ours, read_checkpoint
from flowanchor.checkpoints.sharded import is_sharded, read_sharded
from flowanchor.errors import CheckpointError


def damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint of ours, file or folder; None where nothing is found. Reads all of it.

    `share` of `shares`: what one of several processes reads of it.
    """
    if path.is_dir():
        found = check_folder(path, share, shares)
        reader: Callable[[Path], Any] = read_sharded
    elif path.suffix == SUFFIX:
        return check_seal(path) if share == 0 else None
    else:
        found = check_zip(path) if share == 0 else None
        reader = read_torch
    if found is None and share == 0:
        try:
            reader(path)  # the sums leave out what lies between a zip's entries
        except Exception as error:  # damaged files make PyTorch raise almost anything
            return " ".join(str(error).split())[:200] or type(error).__name__
    return found


def refuse_damaged(path: Path) -> None:
    """Raise `CheckpointError` for a checkpoint, ours or a released one, that is not what was written."""
    if is_sharded(path) or (path.is_file() and in_place(path) is None and is_ours(path)):
        found = damage(path)
    else:  # of others only a zip has sums; their reader says what else is wrong
        found = check_zip(path) if zipfile.is_zipfile(path) else None
    if found is not None:
        before = superseded(path)
        advice = f", or use the one before it, {before}" if before.exists() else ""
        raise CheckpointError(f"{path} is damaged ({found}): copy it again{advice}.")


def readable(path: Path) -> Path:
    """`path`, or the checkpoint before it where it cannot even be read; raises `CheckpointError` where neither can."""
    try:
        read_checkpoint(path)
    except CheckpointError:
        if not superseded(path).exists():
            raise
        read_checkpoint(superseded(path))
        return superseded(path)
    return path


def sound_checkpoint(path: Path) -> Path:
    """`path`, once what lies there is known to be sound; every process of a run calls it.

    A damaged checkpoint is put aside as `NAME.damaged`, and the one before it takes its place.

    Raises `CheckpointError` where that one is damaged or gone.
    """
    found = _agreed(path)
    if found is None:
        return path
    before, aside = superseded(path), path.with_name(f"{path.name}.damaged")
    gone = not before.exists()
    if gone or _agreed(before) is not None:
        state = "there is none before it" if gone else "so is the one before it"
        raise CheckpointError(
            f"{path} is damaged ({found}), and {state}: start afresh with another name=NAME, or from weights that you "
            "have elsewhere with initialise_from=PATH."
        )
    if _rank() == 0:
        remove(aside)
        path.rename(aside)
        before.rename(path)
    _gathered(None)  # nobody reads before the move
    rank_zero_warn(
        f"{path} is damaged ({found}) and was put aside as {aside.name}: the run goes on from the checkpoint before "
        f"it, of step {read_checkpoint(path)['flowanchor']['step']}."
    )
    return path


def _agreed(path: Path) -> str | None:
    """What any process has found wrong."""
    return next((found for found in _gathered(damage(path, _rank(), _world())) if found is not None), None)


def _gathered(value: Any) -> list[Any]:
    if _world() == 1:
        return [value]
    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value)
    return values


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
