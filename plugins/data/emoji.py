"""Emoji in colour, drawn from an installed font: pictures of 32 x 32 in ten classes."""

from __future__ import annotations

import io
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.base.reading import read_regular, shown
from flowanchor.data.base import FlowDataModule
from flowanchor.data.images import ArrayImages, ImageSet, interleave_classes
from flowanchor.errors import ConfigError, DataError

# Code points of one character each (no flags, skin tones or joined ones), up to Unicode 15. A class is one or more
# subgroups of Unicode's emoji list (emoji-test.txt), less what does not look like one: no shells, signs or roads.
CLASSES = {
    "face": "2639-263A 1F47F-1F480 1F600-1F637 1F641-1F644 1F910-1F915 1F917 1F920 1F922-1F925 1F927-1F92F "
    "1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE5 1FAE8",
    "animal-face": "1F428 1F42D-1F432 1F434-1F43C 1F638-1F640 1F648-1F64A 1F981 1F984 1F98A 1F99D 1FACE",
    "animal": "1F400-1F419 1F41B-1F427 1F429-1F42C 1F433 1F43F 1F54A 1F577 1F980 1F982-1F983 1F985-1F989 1F98B-1F99C "
    "1F99E-1F9A9 1F9AB-1F9AE 1FAB0-1FAB3 1FABC 1FABF 1FACF",
    "food": "2615 1F32D-1F330 1F336 1F33D 1F345-1F373 1F375-1F37C 1F37E-1F37F 1F382 1F942-1F943 1F950-1F961 "
    "1F963-1F96F 1F9C0-1F9CB 1FAD0-1FAD8 1FADA-1FADB",
    "vehicle": "26F4-26F5 2708 1F3CD-1F3CE 1F680-1F68E 1F690-1F6A2 1F6A4 1F6B2 1F6E5 1F6E9 1F6F3-1F6F6 1F6F8 "
    "1F6FA-1F6FB",
    "plant": "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F3F5 1F490 1F940 1FAB4 1FAB7 1FABB",
    "place": "26E9-26EA 26F0 26F2 26FA 1F301 1F303-1F307 1F309 1F30B 1F3A0-1F3A2 1F3AA 1F3D4-1F3E6 1F3E8-1F3ED "
    "1F3EF-1F3F0 1F492 1F54B-1F54D 1F5FB-1F5FD 1F6D5-1F6D6",
    "sky": "2600-2604 2614 26A1 26C4-26C5 26C8 2744 2B50 1F300 1F308 1F30A 1F30C 1F311-1F31F 1F321 1F324-1F32C 1F4A7 "
    "1F525 1FA90",
    "person": "1F385 1F466-1F469 1F46E-1F478 1F47C 1F481-1F483 1F486-1F487 1F575 1F57A 1F645-1F647 1F64B 1F64D-1F64E "
    "1F926 1F930-1F931 1F934-1F937 1F977 1F9B8-1F9B9 1F9CC-1F9CF 1F9D1-1F9DF 1FAC3-1FAC5",
    "heart": "2763-2764 1F48C 1F493-1F49F 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77",
}
NOBODY = 0x10FFFE  # never a character: what a font draws for it is what it draws for those that it lacks
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # where Debian and Ubuntu install it
SIZES = (16, 32, 64, 128)
BYTES = 1 << 28  # of a font at most; Debian's has 10 million
STRIKE = 109  # the one size of the font's pictures
DRAWN = (136, 128)  # width and height of a picture of that size
WHERE_FROM = (
    "install Noto Color Emoji (apt install fonts-noto-color-emoji), or set data.font=FILE to its NotoColorEmoji.ttf, "
    "the version with bitmaps."
)
CREDITS = "Noto Color Emoji, copyright Google: drawings under Apache-2.0, font under the SIL Open Font License 1.1"


class EmojiDataModule(FlowDataModule):
    """Emoji on white, 3 channels in [-1, 1]; a tenth of the characters, by their code points, is held out.

    The split depends on nothing but the character, so that another version of the font, or another choice of classes,
    has the same characters for training.

    Args:
        font: a Noto Color Emoji that holds pictures (Debian's fonts-noto-color-emoji), not outlines.
        size: 16, 32, 64 or 128.
        classes: names out of `CLASSES`, in the order of the labels.
        num_classes: how many these are, or 0 to train without labels.
        mirror: train on mirrored copies as well: the set counts twice.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: no such font, or one without pictures of a class.
    """

    name = "emoji"

    def __init__(
        self,
        font: str,
        classes: Sequence[str],
        num_classes: int,
        channels: int = 3,
        size: int = 32,
        mirror: bool = True,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if channels != 3 or size not in SIZES:
            raise ConfigError(
                f"data=emoji has 3 channels and size 16, 32, 64 or 128, not {channels} and {size}: use data.channels=3 "
                "data.size=32."
            )
        strange = [name for name in classes if name not in CLASSES]
        if strange or not classes or len(set(classes)) != len(classes):
            raise ConfigError(
                f"data.classes=[{','.join(classes)}] must name classes of data=emoji, each once: {', '.join(CLASSES)}."
            )
        if num_classes not in (0, len(classes)):
            raise ConfigError(
                f"data.classes names {len(classes)} classes: add data.num_classes={len(classes)} (or "
                "data.num_classes=0 to train without labels)."
            )
        self.font, self.mirror = Path(font).expanduser(), mirror
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.class_names = tuple(classes)

    def load(self) -> dict[str, ImageSet]:
        pictures: list[np.ndarray] = []
        labels: list[int] = []
        held: list[bool] = []
        for label, name in enumerate(self.class_names):
            found = draw(self.font, name)
            pictures += [shrink(pixels, self.size) for pixels in found.values()]
            labels += [label] * len(found)
            held += [is_held_out(code) for code in found]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()  # [N, 3, H, W]
        classes, heldout = np.asarray(labels, dtype=np.int64), np.asarray(held)
        parts = {"train": np.flatnonzero(~heldout), "heldout": np.flatnonzero(heldout)}
        parts["heldout"] = parts["heldout"][interleave_classes(classes[heldout])]
        return {split: ArrayImages(images[torch.from_numpy(part)], classes[part]) for split, part in parts.items()}


def code_points(name: str) -> list[int]:
    """The characters of a class, in Unicode's order."""
    ends = [[int(end, 16) for end in part.split("-")] for part in CLASSES[name].split()]
    return [code for part in ends for code in range(part[0], part[-1] + 1)]


def is_held_out(code: int) -> bool:
    """A tenth of the characters, whatever the set they lie in."""
    return zlib.crc32(f"{code:X}".encode()) % 10 == 0


def describe(code: int) -> str:
    """The character's name in Unicode, in small letters; empty where this Python's Unicode is older than it."""
    return unicodedata.name(chr(code), "").lower()


def draw(path: Path, name: str) -> dict[int, np.ndarray]:
    """The characters of a class that the font has, each as uint8 [128, 128, 3] on white; it tells how many it lacks.

    Raises `DataError` with what to install, where there is no such font or it has no picture in colour.
    """
    font = open_font(path)
    nobody = picture(font, NOBODY)
    drawn = {code: picture(font, code) for code in code_points(name)}
    found = {code: pixels for code, pixels in drawn.items() if not np.array_equal(pixels, nobody)}
    if not any(np.ptp(pixels.astype(int), axis=2).any() for pixels in found.values()):  # none, or gray outlines
        raise DataError(f"{path} has no colour pictures of the class {name}: {WHERE_FROM}")
    if len(found) < len(drawn):
        rank_zero_info(f"Not in {path.name}: {len(drawn) - len(found)} of {len(drawn)} of {name}.")
    return found


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """The font in its one size; raises `DataError` with what to install."""
    try:
        content = io.BytesIO(read_regular(path, BYTES))
        return ImageFont.truetype(content, STRIKE, layout_engine=ImageFont.Layout.BASIC)
    except FileNotFoundError as error:
        raise DataError(f"The font {path} does not exist: {WHERE_FROM}") from error
    except OSError as error:
        raise DataError(f"{path} is no font with pictures of size {STRIKE} ({shown(error)}): {WHERE_FROM}") from error


def picture(font: ImageFont.FreeTypeFont, code: int) -> np.ndarray:
    """A character on white, uint8 [128, 128, 3]; white throughout where a font of bitmaps has none."""
    canvas = Image.new("RGB", DRAWN, "white")
    ImageDraw.Draw(canvas).text((0, 0), chr(code), font=font, embedded_color=True)
    margin = (DRAWN[0] - DRAWN[1]) // 2
    return np.asarray(canvas)[:, margin : DRAWN[0] - margin]


def shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """Means over squares of pixels, uint8 [128, 128, 3] -> [size, size, 3]."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))
