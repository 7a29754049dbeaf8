"""Image grids with labels, as PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flowanchor.base.files import replacing
from flowanchor.errors import ConfigError

BACKGROUND, INK = (255, 255, 255), (30, 30, 30)
TARGET = 40  # a tiny image is enlarged by a whole factor to about this many pixels
GAP = 2  # pixels between images

Pixels = NDArray[np.uint8]


def _font(size: int) -> Any:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)  # ships with matplotlib


def _enlarged(images: Pixels, scale: int | None) -> Pixels:
    """[N, H, W, C] -> [N, s H, s W, 3], nearest neighbour: a pixel stays a square."""
    factor = scale or max(1, round(TARGET / max(images.shape[1:3])))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return images.repeat(3, axis=3) if images.shape[3] == 1 else images[..., :3]


def labelled_grid(
    images: NDArray[Any],
    labels: Sequence[int] | NDArray[Any] | None = None,
    class_names: Sequence[str] = (),
    columns: int | None = None,
    row_names: Sequence[str] | None = None,
    scale: int | None = None,
    title: str = "",
) -> Image.Image:
    """Images [N, H, W, C] (uint8, C = 1 or 3) in a grid, with a name beside each row.

    With `labels` [N] each class gets its own rows (its images in their order), named by `class_names` where given;
    without, images fill the rows in order and `row_names` may name those. `columns` defaults to a nearly square
    grid (without labels) or to the most images that a class has, at most 16. `scale` is the whole-number
    enlargement (default: to about 40 pixels). A `title` goes above, smaller or in two lines where it is long.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3) or not len(images):
        raise ConfigError(
            f"A grid is made of uint8 images [N, H, W, C] with 1 or 3 channels, and got {images.dtype} {images.shape}."
        )
    if labels is None:
        width = columns or int(np.ceil(np.sqrt(len(images))))
        rows = [images[i : i + width] for i in range(0, len(images), width)]
        names = list(row_names or [])
    else:
        values = np.asarray(labels)
        groups = [(int(c), images[values == c]) for c in np.unique(values)]
        width = columns or min(16, max(len(group) for _, group in groups))
        rows, names = [], []
        for c, group in groups:
            lines = [group[i : i + width] for i in range(0, len(group), width)]
            rows += lines
            names += [class_names[c] if c < len(class_names) else str(c)] + [""] * (len(lines) - 1)
    page = _paint([_enlarged(row, scale) for row in rows], names, width)
    return titled(page, title) if title else page


def _paint(rows: list[Pixels], names: list[str], columns: int) -> Image.Image:
    height, width = rows[0].shape[1:3]
    font = _font(max(11, min(16, height // 2)))
    margin = int(max((font.getlength(name) for name in names), default=0)) + (10 if names else 0)
    page = Image.new(
        "RGB", (margin + columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP), color=BACKGROUND
    )
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        top = GAP + i * (height + GAP)
        if i < len(names):
            draw.text((margin - 6, top + height // 2), names[i], fill=INK, font=font, anchor="rm")
        for j, image in enumerate(row):
            page.paste(Image.fromarray(image), (margin + GAP + j * (width + GAP), top))
    return page


def titled(page: Image.Image, title: str) -> Image.Image:
    """A page with a line above it; a long one goes on in further lines, and the page is no narrower than a word."""
    font = _font(13)
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > page.width - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    width = max(page.width, *(int(font.getlength(line)) + 8 for line in lines))
    head = 18 * len(lines) + 6
    whole = Image.new("RGB", (width, head + page.height), color=BACKGROUND)
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        draw.text((4, 12 + 18 * number), line, fill=INK, font=font, anchor="lm")
    whole.paste(page, (0, head))
    return whole


def join(pictures: Sequence[Image.Image], titles: Sequence[str], space: int = 16) -> Image.Image:
    """Pictures side by side under their titles."""
    font = _font(15)
    widths = [max(p.width, int(font.getlength(t)) + 8) for p, t in zip(pictures, titles, strict=True)]
    head = 28
    page = Image.new(
        "RGB",
        (sum(widths) + space * (len(pictures) + 1), head + max(p.height for p in pictures) + space),
        color=BACKGROUND,
    )
    draw, left = ImageDraw.Draw(page), space
    for picture, title, width in zip(pictures, titles, widths, strict=True):
        draw.text((left + width // 2, head // 2 + 2), title, fill=INK, font=font, anchor="mm")
        page.paste(picture, (left + (width - picture.width) // 2, head))
        left += width + space
    return page


def save_picture(picture: Image.Image, path: Path) -> None:
    """A picture as a PNG file; creates its folder."""
    with replacing(path) as draft:
        picture.save(draft, format="PNG")


def save_grid(path: str | Path, images: NDArray[Any], **options: Any) -> Path:
    """`labelled_grid` into a PNG file; creates its folder."""
    target = Path(path)
    save_picture(labelled_grid(images, **options), target)
    return target
