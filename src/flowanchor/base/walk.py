"""What lies below a folder: through links, each real folder once, in an order that depends on names alone."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

HIDDEN_FOLDERS = "__MACOSX"  # what macOS puts into archives


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: it begins with a dot, or is macOS's."""
    return name.startswith(".") or name == HIDDEN_FOLDERS


def walk(root: Path, left_out: Counter[str] | None = None, hidden: bool = False) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder that is no folder itself.

    Links to folders are followed, after all that can be reached without them, so that a file has its real name where
    it has one. Each real folder is entered once, and none that the root lies in: loops end.

    Args:
        left_out: counts what is not entered, by what it is.
        hidden: whether hidden files and folders are there, too.
    """
    left_out = Counter() if left_out is None else left_out
    seen = {str(folder) for folder in Path(os.path.realpath(root)).parents}
    plain, linked = deque([str(root)]), deque[str]()
    while plain or linked:
        here = (plain or linked).popleft()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(here) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # one that may not be read, or is gone by now
            left_out["folders that cannot be read"] += 1
            continue
        for entry in found:
            if not hidden and is_hidden(entry.name):
                left_out["hidden"] += 1
            elif not is_folder(entry):
                yield entry
            else:
                (linked if entry.is_symlink() else plain).append(entry.path)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
