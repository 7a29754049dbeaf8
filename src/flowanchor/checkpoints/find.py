"""The checkpoint behind a path that a user typed."""

from __future__ import annotations

import os
from pathlib import Path

from flowanchor.base.files import superseded
from flowanchor.checkpoints.consolidated import is_consolidated
from flowanchor.checkpoints.formats import recognised
from flowanchor.checkpoints.huggingface import WEIGHTS, is_published
from flowanchor.checkpoints.sharded_folder import is_sharded
from flowanchor.checkpoints.shipped import shipped_folder, shipped_names
from flowanchor.errors import CheckpointError, ConfigError


def latest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint, file or folder, from which a run goes on; None where there is none yet."""
    last = Path(run) / "checkpoints" / "last.ckpt"
    # A save that was cut off between its two last moves leaves the earlier checkpoint under its other name.
    return next((path for path in (last, superseded(last)) if path.is_file() or is_sharded(path)), None)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint behind a path: the file or sharded folder itself, the last one of a run folder, the weights of a
    folder that convert.py published, a folder of a registered format; or a model that comes with the package, by its
    name, where nothing lies at that path."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"A checkpoint is one path, and {path!r} is none: give checkpoint=PATH.")
    path = Path(path).expanduser()
    path = shipped_folder(path) or path
    if path.is_dir():
        inside = path if is_sharded(path) else latest_checkpoint(path)
        if inside is None and is_published(path) and is_consolidated(path / WEIGHTS):
            inside = path / WEIGHTS
        if inside is None and recognised(path):
            inside = path
        if inside is None and is_published(path):
            inside = path / WEIGHTS
        if inside is None:
            raise CheckpointError(
                f"The folder {path} holds no checkpoints/last.ckpt: "
                "give a run folder that was trained, a .ckpt file, or what convert.py wrote."
            )
        return inside
    if not path.is_file():
        bare = len(path.parts) == 1 and not path.suffix
        named = f", or the name of a model that comes along ({', '.join(shipped_names())})" if bare else ""
        raise CheckpointError(
            f"There is no checkpoint at {path}: give a .ckpt file or the run folder that a training left{named}."
        )
    return path
