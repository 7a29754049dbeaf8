"""Pictures of docs that are drawn from records: each says in itself what it shows, so that an old one is noticed.

    python benchmarks/pictures.py            # draws those anew that no longer show what their records say
    python benchmarks/pictures.py --all      # all of them

Bytes of a PNG change with every version of matplotlib and of a font; curves, squares and words do not. Their hash is
written into the file as text, `Shown`, and one of its pixels, `Pixels`: a test compares both.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "images"
SHOWN, PIXELS = "Shown", "Pixels"
DPI = 110


def shown(figure: Figure) -> str:
    """Hash (hex) of the curves, images, shapes and words of a figure; nothing of it is rendered."""
    found: list[Any] = [
        text.get_text() for text in (figure._suptitle, figure._supxlabel, figure._supylabel) if text is not None
    ]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()]
        for axis in (axes.xaxis, axes.yaxis):
            ticks = axis.get_major_locator()
            if isinstance(ticks, FixedLocator):  # others are matplotlib's own choice
                found.append(axis.get_major_formatter().format_ticks(list(ticks.locs)))
        for line in axes.lines:
            label = str(line.get_label())
            found += [_numbers(line.get_xydata()), line.get_linestyle(), to_hex(line.get_color())]
            found.append("" if label.startswith("_") else label)
        for image in axes.images:
            found += [_numbers(image.get_array()), image.get_cmap().name]
        for patch in axes.patches:
            found.append(_numbers(patch.get_patch_transform().transform(patch.get_path().vertices)))
        for text in axes.texts:
            to = _numbers(text.xy) if isinstance(text, Annotation) else []
            found.append([text.get_text(), _numbers(text.get_position()), to])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _numbers(values: Any) -> list[str]:
    """Six digits of each, and the shape."""
    array = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    return [str(array.shape), *(f"{value + 0.0:.6g}" for value in array.ravel())]


def keep(figure: Figure, path: Path) -> None:
    """Save a figure as PNG, with what it shows and what came of it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    picture = Image.open(buffer)
    said = PngInfo()
    said.add_text(SHOWN, shown(figure))
    said.add_text(PIXELS, pixels(picture))
    picture.save(path, pnginfo=said, optimize=True)


def pixels(picture: Image.Image) -> str:
    """Hash (hex) of an image's pixels, however they are packed."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.convert("RGBA").tobytes()).hexdigest()


def said(path: Path) -> tuple[str | None, str | None, str]:
    """What a file says that it shows, the hash of the pixels that it was written with, and that of those it has."""
    with Image.open(path) as picture:
        picture.load()
        return picture.info.get(SHOWN), picture.info.get(PIXELS), pixels(picture)


def drawings() -> dict[str, Callable[[], Figure]]:
    """By file, the figure of what its record says now."""
    # They import `keep` from here.
    import ablation
    import forgetting
    import stability
    import structure

    found: dict[str, Callable[[], Figure]] = {
        "ablation.png": lambda: ablation.figure_of(json.loads((ablation.RESULTS / ablation.RECORD).read_text())),
        "forgetting.png": lambda: forgetting.figure(json.loads(forgetting.RECORD.read_text())),
        "rooms.png": lambda: structure.figure_of(ROOT),
    }
    for data in stability.STEPS:
        if stability.place(data).is_file():
            found[f"stability_{data}.png"] = lambda data=data: stability.picture(
                json.loads(stability.place(data).read_text()), stability.cells(data)
            )
    return found


# The others of docs/images, and what they are of: no record holds what they show.
UNRECORDED = {
    "demo.png": "samples and scores of `make demo`, copied from its run",
    "emoji.png": "samples of the networks that come along, by benchmarks/emoji_pictures.py",
    "play.png": "a browser's window",
    "report.png": "a browser's window",
    "site.png": "a browser's window",
    "wan_digits.png": "samples of the last run of benchmarks/wan_digits.py",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs that come from records.")
    parser.add_argument("--all", action="store_true", help="those too that show what their records say")
    chosen = parser.parse_args()
    for name, drawn in drawings().items():
        figure = drawn()
        if chosen.all or said(FOLDER / name)[0] != shown(figure):
            keep(figure, FOLDER / name)
            print(f"drew {name}", file=sys.stderr)


if __name__ == "__main__":
    main()
