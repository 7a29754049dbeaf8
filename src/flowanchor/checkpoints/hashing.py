"""The sha256 of what a file or folder holds; large ones are read once in a process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from flowanchor.base.rank_zero import rank_zero_info

_LARGE = 4 << 30  # bytes whose reading is announced
_DIGESTS: dict[tuple[Any, ...], str] = {}  # what this process has hashed: names, sizes and times of files -> digest


def content_digest(path: Path) -> str:
    """sha256 of a file, hex; of a folder, that of its files' names and contents.

    A file is read once in a process, until its size or times change.
    """
    digest = hashlib.sha256()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [file.stat() for file in files]
    times = [(state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]
    key = (path.is_dir(), *map(str, files), *times)
    if key in _DIGESTS:
        return _DIGESTS[key]
    size = sum(state.st_size for state in states)
    if size > _LARGE:
        rank_zero_info(f"Reading the {size / 1e9:.0f} GB of {path} for their sha256.")
    for file in files:
        if path.is_dir():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return _DIGESTS.setdefault(key, digest.hexdigest())
