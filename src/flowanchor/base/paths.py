"""Paths as people type them, and names as folders."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def from_here(path: Path | str) -> Path:
    """A path as somebody in this folder types it."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def folder_name(name: str) -> str:
    """A name as a folder's: as it is, but for what some file system or Hydra's quotes cannot hold. Names that differ
    there only stay apart by their hash."""
    safe = re.sub(r"[^\w .,;:+=@~#&()\[\]'!%-]+", "-", name)
    return safe if safe == name else f"{safe}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
