"""Trained models that come with the package, known by name: `flowanchor.load("digits")`.

They are folders that convert.py published, under `shipped/` in the package, and are opened through the same doors as a
folder from anywhere else. A path wins over a name: only where nothing lies at what was typed is it looked up here.
"""

from __future__ import annotations

from pathlib import Path

from flowanchor.checkpoints.huggingface import is_published

FOLDER = Path(__file__).resolve().parents[1] / "shipped"


def shipped_names() -> list[str]:
    """Names of the models that come along, sorted."""
    return sorted(path.name for path in FOLDER.glob("*") if is_published(path))


def shipped_folder(path: Path) -> Path | None:
    """The published folder of a bare name at which nothing lies; None for any other path."""
    if len(path.parts) != 1 or path.exists() or path.name not in shipped_names():
        return None
    return FOLDER / path.name
