"""Pictures as people use them: PNG files that say where they come from, and the way from noise to data as a film."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowanchor.base.files import replacing
from flowanchor.base.version import VERSION

SMALL, LARGE = 128, 256  # pixels: smaller images are enlarged, to about so many
FILMS = ("gif", "webp")
FIRST, LAST = 600, 1500  # milliseconds for which a film rests on the noise, and on the data
LENGTH, STEP = 2000, 500  # milliseconds of the way between them, and of one frame of it at most

Pixels = NDArray[np.uint8]


def factor(height: int, width: int, scale: int | None = None) -> int:
    """By what whole number an image is enlarged: `scale`, else as often as it takes a small one to about 256 pixels."""
    longest = max(height, width)
    return scale or (max(1, round(LARGE / longest)) if longest < SMALL else 1)


def picture(image: Pixels, scale: int | None = None) -> Image.Image:
    """uint8 [H, W, 1 or 3] as a picture, enlarged by a whole factor: a pixel stays a square."""
    times = factor(image.shape[0], image.shape[1], scale)
    whole = image.repeat(times, axis=0).repeat(times, axis=1)
    return Image.fromarray(whole[..., 0] if whole.shape[2] == 1 else whole)


def save_png(path: Path, image: Pixels, facts: Mapping[str, Any], scale: int | None = None) -> None:
    """A picture as a PNG file. Its text entry `flowanchor` holds the facts as JSON; `Software` names the version."""
    with replacing(path) as draft:
        picture(image, scale).save(draft, format="PNG", pnginfo=described(facts))


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of `save_png`; raises `KeyError` for a file without them."""
    with Image.open(path) as file:
        found: dict[str, Any] = json.loads(file.info["flowanchor"])
        return found


def file_name(index: int, count: int, shown: str | None) -> str:
    """`00012_ankle-boot.png`: the number of the image, of so many, and what it shows as letters and digits."""
    digits = max(5, len(str(count - 1)))
    word = re.sub(r"[^\w.]+", "-", shown or "").strip("-.")[:60].rstrip("-.")
    return f"{index:0{digits}d}{'_' if word else ''}{word}.png"


def save_film(path: Path, frames: Sequence[Image.Image]) -> None:
    """An animated .gif or .webp (by the name of the file) that rests on its first and its last frame, for ever."""
    between = max(1, len(frames) - 2)
    times = [FIRST, *[min(STEP, max(20, LENGTH // between))] * (len(frames) - 2), LAST][-len(frames) :]
    kind = path.suffix[1:]
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {"disposal": 1}
    with replacing(path) as draft:
        frames[0].save(
            draft, format=kind.upper(), save_all=True, append_images=list(frames[1:]), duration=times, loop=0, **options
        )


def described(facts: Mapping[str, Any]) -> PngInfo:
    """What a PNG file says of itself: the facts as JSON, and the version."""
    info = PngInfo()
    info.add_text("Software", f"flowanchor {VERSION}")
    info.add_text("flowanchor", json.dumps(dict(facts)))
    return info
