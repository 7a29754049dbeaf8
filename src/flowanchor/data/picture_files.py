"""Which files of a folder are pictures, which of its folders are classes, and what else is there."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flowanchor.base.reading import shown
from flowanchor.base.walk import is_folder, is_hidden, walk
from flowanchor.errors import DataError

# What Pillow registers for the formats that `open_picture` reads.
EXTENSIONS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib", ".tif",
              ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs", ".jp2", ".j2k", ".jpx", ".jpf",
              ".jpc", ".j2c")  # fmt: skip
KNOWN = "PNG, JPEG, WebP, GIF, TIFF, BMP, PPM, AVIF, JPEG 2000"  # of messages


def find_pictures(folder: Path, left_out: Counter[str] | None = None) -> dict[Path, str]:
    """The pictures below a folder (`walk`) in the order of their names, each with a mark of its size and time.

    Regular files with a picture's extension; what else is there is counted in `left_out`, by its kind.
    """
    left_out = Counter() if left_out is None else left_out
    found = {}
    for entry in walk(folder, left_out):
        extension = os.path.splitext(entry.name)[1].lower()
        if extension not in EXTENSIONS:
            left_out[extension or "without extension"] += 1
        elif (mark := file_mark(entry.path)) is None:  # a pipe to wait on, a device, a link to nothing
            left_out["that are no regular files"] += 1
        else:
            found[Path(entry.path)] = mark
    return dict(sorted(found.items()))


def find_by_class(root: Path, folders: Sequence[str], left_out: Counter[str]) -> list[dict[Path, str]]:
    """`find_pictures` of each subfolder, each real file once: links to others of them go."""
    found = [find_pictures(root / folder, left_out) for folder in folders]
    parents: dict[Path, str] = {}
    linked: list[tuple[dict[Path, str], Path, str]] = []
    taken: set[str] = set()
    here = os.path.realpath(root)
    for files in found:
        for path in files:
            if path.parent not in parents:
                parents[path.parent] = os.path.realpath(path.parent)
            parent = parents[path.parent]
            plain = parent == os.path.normpath(os.path.join(here, path.parent.relative_to(root)))
            if plain and not path.is_symlink():
                taken.add(os.path.join(parent, path.name))
            else:
                linked.append((files, path, os.path.realpath(path)))
    for files, path, real in linked:
        if real in taken:
            del files[path]
            left_out["links to others of them"] += 1
        taken.add(real)
    return found


def file_mark(path: Path | str) -> str | None:
    """Size and time of a regular file: another mark, another content. None where it is none."""
    try:
        place = os.stat(path)
    except (OSError, ValueError):
        return None
    return f"{place.st_size} {place.st_mtime_ns}" if stat.S_ISREG(place.st_mode) else None


def tell_unused(unused: Counter[str], where: object) -> list[str]:
    """A line about what is somewhere and not used; none where there is nothing."""
    listed = ", ".join(f"{count:,} {shown(kind)}" for kind, count in sorted(unused.items())[:10])
    more = f", and {len(unused) - 10:,} other kinds" if len(unused) > 10 else ""
    return [f"Not used, files in {shown(where)}: {listed}{more}."] if unused else []


def class_folders(root: Path, left_out: Counter[str] | None = None) -> list[str]:
    """The subfolders of a folder that are classes, in the order of their names: neither hidden nor a link to where they
    lie in. What else is there is counted.

    Raises `DataError` for a name that is no text, and for two classes that are one folder.
    """
    left_out = Counter() if left_out is None else left_out
    here = Path(os.path.realpath(root))
    places: dict[str, str] = {}
    with os.scandir(root) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        real = os.path.realpath(entry.path)
        if is_hidden(entry.name):
            left_out["hidden"] += 1
        elif not is_folder(entry):
            left_out["outside of the class folders"] += 1
        elif Path(real) not in (here, *here.parents):
            if any("\ud800" <= letter <= "\udfff" for letter in entry.name):
                raise DataError(f"The name of the class folder {shown(entry.path)} is not UTF-8: rename it.")
            if real in places:
                raise DataError(
                    f"The class folders {shown(places[real])} and {shown(entry.name)} of {shown(root)} are one folder: "
                    "remove one of the two links."
                )
            places[real] = entry.name
    return list(places.values())
