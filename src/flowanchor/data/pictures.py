"""Pictures out of files that anybody may have made, as viewers show them: for trainer, encoders and references."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from PIL import Image

from flowanchor.base.reading import read_regular, shown
from flowanchor.data.eight_bits import eight_bit
from flowanchor.errors import DataError

Found = TypeVar("Found")

# By content, whatever a file is called. Pillow would open some forty formats, and some by other programs: PostScript by
# Ghostscript. These are made of pixels alone.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")

ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

BYTES = 1 << 30  # of a file
PIXELS = 1 << 27  # 134 million; decoding them takes up to 2.5 GB and some seconds (WebP, JPEG 2000)
SIDE = 4  # pixels of the shorter side at least: less, scaled up, is a flat colour
RATIO = 100  # of the longer side to the shorter one at most
SCANS = 1 << 31  # pixels times passes of a progressive JPEG: an ordinary one has ten, each may take 170 bytes of a file


class PictureError(DataError):
    """A file that is no picture, a damaged one, or one beyond the limits.

    Attributes:
        fault: which file it is, and why it cannot be read.
        reason: the latter alone.
    """

    def __init__(self, name: object, reason: str) -> None:
        self.fault = f"{shown(name)} cannot be read as an image ({reason})"
        super().__init__(f"{self.fault}: repair or remove it.")
        self.name, self.reason = str(name), reason

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:  # out of a loader's worker
        return type(self), (self.name, self.reason)


# What opening one picture of many may raise: where its bytes cannot be had, and where they are none.
UNREADABLE = (PictureError, OSError)


def open_picture(source: Path | bytes, mode: str, name: object = None, upright: bool = True) -> Image.Image:
    """The pixels of a picture, in Pillow's mode `RGB` or `L`; raises `PictureError`, and nothing else.

    Of several pictures in a file (an animation, pages) the first. Other depths and transparency: `eight_bit`.

    Args:
        upright: turned as its EXIF data says, as viewers do. A PNG's counts where it stands before the pixels. A TIFF
            is always turned.
    """

    def look(image: Image.Image) -> Image.Image:
        turn = _turn(image) if upright else None
        found = eight_bit(image, mode)
        return found if turn is None else found.transpose(turn)

    return _look(source, name, look)


def picture_size(source: Path | bytes, name: object = None) -> tuple[int, int]:
    """Width and height that `open_picture` would give; the beginning of a file is enough for most formats."""

    def look(image: Image.Image) -> tuple[int, int]:
        turn = _turn(image)
        sideways = turn in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
        return image.size[::-1] if sideways else image.size

    return _look(source, name, look)


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


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What sets a picture upright that was only opened so far."""
    if image.format == "TIFF" and image.tag_v2.get(ORIENTATION, 1) != 1:  # type: ignore[attr-defined]
        image.load()  # which turns it
        return None
    try:
        exif = Image.Image.getexif(image)  # a PNG's own would decode all pixels, to look behind them
    except Exception:  # damaged: shown as it is, as by viewers
        return None
    return TURNS.get(exif.get(ORIENTATION, 1))


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
