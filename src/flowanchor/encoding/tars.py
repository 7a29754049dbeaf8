"""Images in tars of WebDataset, with what is said of each; what is there and not used is counted and named."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flowanchor.base.reading import read_regular, shown
from flowanchor.data.picture_files import EXTENSIONS
from flowanchor.data.pictures import BYTES
from flowanchor.data.tar_members import Content, mapped_members
from flowanchor.errors import DataError

# What an image is called inside a tar, and what is one only where its key has no other: a preview.
IMAGES = tuple(extension.lstrip(".") for extension in EXTENSIONS if extension != ".gif")
PREVIEW = "gif"


class Member(NamedTuple):
    """One file of a tar: `<key>.<extension>`; a key may lie in a folder."""

    name: str
    key: str
    extension: str  # lower case
    offset: int
    content: Content

    @property
    def place(self) -> tuple[int, int]:
        """Where its content lies in the tar: offset and size."""
        return self.offset, len(self.content)


@dataclass
class TarContent:
    """What one tar holds.

    Attributes:
        images: by key, in the tar's order: offset and size.
        notes: by key: what stands beside an image, by extension, the last one read last.
        unused: how many files of each kind are not used.
    """

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: dict[str, dict[str, Content]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)


def read_tar(path: Path, notes: Sequence[str]) -> TarContent:
    """The images of a tar and their notes (files of these extensions, `cls`), which may stand apart from them.

    Raises:
        DataError: no tar, a damaged or cut one, a key that is there twice, or one of an image with a dot in it.
    """
    found = TarContent()
    seen: dict[str, str] = {}
    dotted: dict[str, str] = {}
    previews: dict[str, tuple[int, int]] = {}
    for member in _members(path, found.unused):
        if member.extension in IMAGES:
            if member.key in found.images:
                raise DataError(_twice(path, seen[member.key], member.name))
            found.images[member.key], seen[member.key] = member.place, member.name
        elif member.extension == PREVIEW and member.key not in previews:
            previews[member.key] = member.place
        elif member.extension in notes:
            beside = found.notes.setdefault(member.key, {})
            if member.extension in beside:
                raise DataError(_twice(path, member.name, member.name))
            beside[member.extension] = member.content
        else:
            found.unused[f".{member.extension}" if member.extension else "without extension"] += 1
            if member.extension.rpartition(".")[2] in IMAGES:
                dotted.setdefault(member.key, member.name)
    found.unused.update(f".{PREVIEW}" for key in previews if key in found.images)
    found.images = dict(sorted((previews | found.images).items(), key=lambda image: image[1]))
    lost = next((name for key, name in dotted.items() if key not in found.images), None)
    if lost is not None:
        raise DataError(
            f"{shown(path)} holds {shown(lost)}, which is no image: in a tar, a key ends at the first dot of a name, "
            "so write the key without dots."
        )
    for key in found.notes.keys() - found.images.keys():
        found.unused.update(f".{extension} without an image" for extension in found.notes.pop(key))
    return found


def tar_names(tars: Sequence[Path]) -> list[str]:
    """A name for each of some tars: that of its file, or, where two have the same, its path below what they share."""
    names = [path.name for path in tars]
    if len(set(names)) < len(names):
        places = [path.resolve() for path in tars]
        if len(set(places)) < len(places):
            again = next(path for number, path in enumerate(tars) if places[number] in places[:number])
            raise DataError(f"The tar {shown(again)} is there twice: name it once in data.root.")
        shared = os.path.commonpath([path.parent for path in places])
        names = [path.relative_to(shared).as_posix() for path in places]
    return names


def read_member(tar: Path, place: tuple[int, int], count: int | None = None) -> bytes:
    """A member's content, or its first `count` bytes; raises `OSError`."""
    offset, size = place
    return read_regular(tar, BYTES, offset, size if count is None else min(size, count))


def _members(path: Path, unused: Counter[str]) -> Iterable[Member]:
    for entry in mapped_members(path):
        if entry.kind == "file":
            folder, _, name = entry.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            yield Member(entry.name, key, extension.lower(), entry.offset, entry.content)
        elif entry.kind != "folder":
            unused[f"{entry.kind}s"] += 1


def _twice(path: Path, first: str, second: str) -> str:
    if first == second:
        return f"{shown(path)} holds {shown(first)} twice: keys must be unique within a tar."
    return (
        f"{shown(path)} holds two images of one key, {shown(first)} and {shown(second)}: leave one out, or call it "
        "KEY.NAME.png."
    )
