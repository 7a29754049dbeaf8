"""What identifies the weights behind a path."""

from __future__ import annotations

from pathlib import Path

from flowanchor.checkpoints.formats import in_place
from flowanchor.checkpoints.hashing import content_digest


def file_digest(path: str | Path) -> str:
    """sha256, hex: of a file, of a sharded checkpoint's files and their names, or of what a format identifies by."""
    path = Path(path)
    format = in_place(path)
    return content_digest(path) if format is None else format.digest(path)
