"""The emoji of `data=emoji` as files, for whatever reads a folder of pictures.

    python -m flowanchor.plugins.data.emoji_folder FOLDER --classes animal food --size 64

FOLDER/animal/1F40C.png, its name ("snail") in FOLDER/captions.csv, and FOLDER/CREDITS.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flowanchor.base.files import replacing
from flowanchor.errors import FlowAnchorError
from flowanchor.plugins.data.emoji import CLASSES, CREDITS, FONT, SIZES, describe, draw, shrink


def write_folder(folder: Path, font: Path, classes: Sequence[str], size: int) -> int:
    """Write the pictures of some classes, each as PNG [size, size, 3], their names and the credits; how many.

    A character that is newer than this Python's table of Unicode has no caption.

    Raises `DataError` without the font.
    """
    count, rows = 0, []
    for name in classes:
        for code, pixels in draw(font, name).items():
            file = f"{name}/{code:X}.png"
            with replacing(folder / file) as draft:
                Image.fromarray(shrink(pixels, size)).save(draft, format="PNG")
            count += 1
            rows += [(file, caption)] if (caption := describe(code)) else []
    with replacing(folder / "captions.csv") as draft, open(draft, "w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([("file", "caption"), *rows])
    with replacing(folder / "CREDITS.md") as draft:
        draft.write_text(f"Pictures: {CREDITS}.\n", encoding="utf-8")
    return count


def main(words: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(
        prog="python -m flowanchor.plugins.data.emoji_folder", description="Emoji as files."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", nargs="+", choices=list(CLASSES), default=list(CLASSES), help="default: all ten")
    parser.add_argument("--size", type=int, choices=SIZES, default=32)
    parser.add_argument("--font", type=Path, default=Path(FONT))
    asked = parser.parse_args(words)
    try:
        count = write_folder(asked.folder, asked.font, asked.classes, asked.size)
    except (FlowAnchorError, OSError) as error:
        sys.exit(f"Error: {str(error).replace('data.font=FILE', '--font FILE')}")
    print(f"{count} pictures in {asked.folder}. {CREDITS}.")


if __name__ == "__main__":
    main()
