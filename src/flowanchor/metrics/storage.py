"""Where metrics keep what they have looked at, and what is written and read there."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flowanchor.base import files
from flowanchor.errors import ConfigError

# What reading a file raises that is cut off or foreign.
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def cache_folder(path: str | Path) -> Path:
    """The folder of `metric.cache_dir`; of a user without a home, what begins with `~` lies below the temporary folder.

    A container that runs as a number has no entry in /etc/passwd, and `~` no meaning there.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        owner = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir(), f"flowanchor-{owner}", *Path(path).parts[1:])


def write_whole(path: Path, content: bytes | Mapping[str, np.ndarray]) -> None:
    """`flowanchor.base.files.write_whole` of bytes, or arrays as an .npz, where several programs may write at once.

    Raises `ConfigError` where the disk is full or the folder cannot be written; an earlier file stays as it was.
    """
    try:
        files.write_whole(path, content, shared=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{path} cannot be written ({reason}): make room, or choose other folders by hydra.run.dir=FOLDER and "
            "metric.cache_dir=FOLDER; the same command goes on from what was written before."
        ) from error


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz of ours; None where it is not there or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except DAMAGED:
        return None
