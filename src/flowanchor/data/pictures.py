"""Pictures out of files that anybody may have made: which files are pictures, and how one is opened."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from flowanchor.base.reading import read_regular, shown
from flowanchor.errors import DataError

Found = TypeVar("Found")

EXTENSIONS: tuple[str, ...] = IMG_EXTENSIONS

# By content, whatever a file is called. Pillow would open some forty formats, and some by other programs: PostScript by
# Ghostscript. These are made of pixels alone.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")

BYTES = 1 << 30  # of a file
PIXELS = 1 << 27  # 134 million; decoding them takes up to 2.5 GB and some seconds (WebP, JPEG 2000)
SIDE = 4  # pixels of the shorter side at least: less, scaled up, is a flat colour
RATIO = 100  # of the longer side to the shorter one at most
SCANS = 1 << 31  # pixels times passes of a progressive JPEG: an ordinary one has ten, each may take 170 bytes of a file


class PictureError(DataError):
    """A file that is no picture, a damaged one, or one beyond the limits; `reason` says which, without the name."""

    def __init__(self, name: object, reason: str) -> None:
        super().__init__(f"{shown(name)} cannot be read as an image ({reason}): repair or remove it.")
        self.reason = reason


# What opening one picture of many may raise: where its bytes cannot be had, and where they are none.
UNREADABLE = (PictureError, OSError)


def open_picture(source: Path | bytes, mode: str, name: object = None) -> Image.Image:
    """The pixels of a picture, in Pillow's mode `RGB` or `L`; raises `PictureError`, and nothing else."""
    return _look(source, name, lambda image: image.convert(mode))


def picture_size(source: Path | bytes, name: object = None) -> tuple[int, int]:
    """Width and height that `open_picture` would give; the beginning of a file is enough for most formats."""
    return _look(source, name, lambda image: image.size)


def reason_of(error: BaseException) -> str:
    """Why a picture cannot be read, in a few words, the same in every run."""
    if isinstance(error, PictureError):
        return error.reason
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = re.sub(r" <.*>|, could be decompression bomb.*", "", str(error))  # without addresses of objects
    return shown(text[:100] or type(error).__name__)


def middle(image: Image.Image, ratio: int = RATIO) -> Image.Image:
    """The middle of what is longer than `ratio` times its shorter side: scaled as a whole, it could take all memory."""
    width, height = (min(side, ratio * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def picture_files(folder: Path, links: bool = False) -> Iterator[Path]:
    """Regular files with a picture's extension below a folder, in no order.

    Args:
        links: whether linked folders are entered, too; each real folder once, so that loops end.
    """
    waiting, seen = [folder], set()
    while waiting:
        here = waiting.pop()
        try:
            place = os.stat(here)
            if links and (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(here) as entries:
                for entry in entries:
                    path = here / entry.name
                    if entry.is_dir(follow_symlinks=links):
                        waiting.append(path)
                    elif path.suffix.lower() in EXTENSIONS and os.path.isfile(path):  # no pipe to wait on, no device
                        yield path
        except OSError:  # a folder that may not be read, or is gone by now
            continue


def class_folders(root: Path) -> list[str]:
    """The subfolders of a folder, in the order of their names; raises `DataError` for a name that is no text."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DataError(f"The name of the class folder {shown(root / name)} is not UTF-8: rename it.")
    return names


def _look(source: Path | bytes, name: object, look: Callable[[Image.Image], Found]) -> Found:
    name = name or (source if isinstance(source, Path) else "The file")
    try:
        content = read_regular(source, BYTES) if isinstance(source, Path) else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each odd file some, without its name
            with Image.open(io.BytesIO(content), formats=_formats()) as image:
                _check(image, content)
                return look(image)
    except Exception as error:  # Pillow's plugins let through whatever a damaged file makes them raise
        raise PictureError(name, reason_of(error)) from error


def _check(image: Image.Image, content: bytes) -> None:
    """Raise `ValueError` for a picture beyond the limits; only its header has been read so far."""
    width, height = image.size
    what = f"{width} x {height} pixels"
    if min(width, height) < SIDE:
        raise ValueError(f"{what}: a side must have {SIDE} at least")
    if max(width, height) > RATIO * min(width, height):
        raise ValueError(f"{what}: one side may be {RATIO} times the other at most")
    if width * height > PIXELS:
        raise ValueError(f"{what}: {PIXELS:,} at most")
    if image.format in ("JPEG", "MPO") and (scans := content.count(b"\xff\xda")) * width * height > SCANS:
        raise ValueError(f"{what} in {scans} passes take too long")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a build of Pillow may lack some
