"""How a sharded checkpoint is known from outside, without the library that reads it (it takes a second to import)."""

from __future__ import annotations

from pathlib import Path

META, INDEX = "meta.pt", ".metadata"


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a complete sharded checkpoint (`meta.pt` is written last)."""
    return (Path(path) / META).is_file() and (Path(path) / INDEX).is_file()
