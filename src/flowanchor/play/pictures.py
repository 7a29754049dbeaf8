"""Drawings as pictures to look at and to keep: tiny images grow by a whole factor, so that pixels stay squares."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flowanchor.play.drawing import Drawing, Pixels
from flowanchor.reporting.grids import join, labelled_grid
from flowanchor.reporting.pictures import described

WIDTH, HEIGHT = 560, 640  # pixels that a grid of tiny images is enlarged to at most, so that it is seen at one glance
TILE = 96  # and each of them
LONGEST = 22  # characters of a prompt beside its row


def grid(drawing: Drawing, names: Sequence[str] = ()) -> Image.Image:
    """A row per class or prompt with its name; without either, as square as it can be.

    `names`: of the classes.
    """
    if not drawing.subjects:
        return _plain(drawing.images, int(np.ceil(np.sqrt(len(drawing.images)))))
    rows = [_row_name(subject, names) for subject in drawing.subjects]
    return _plain(drawing.images, drawing.each, rows)


def _plain(images: Pixels, columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    return labelled_grid(images, columns=columns, row_names=row_names, scale=factor(images, columns))


def factor(images: Pixels, columns: int) -> int:
    """The whole number by which images [N, H, W, C] are enlarged; 1 for those that are large already."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    return max(1, min(WIDTH // (columns * width), HEIGHT // (rows * height), TILE // max(height, width)))


def frame(drawing: Drawing, number: int) -> Image.Image:
    """A stop on the way from noise (0) to picture."""
    images = drawing.frames[max(0, min(number, len(drawing.frames) - 1))]
    return _plain(images, min(5, len(images)))


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Grids beside each other under their titles, as one picture."""
    return join(pictures, titles)


def as_png(picture: Image.Image, drawing: Drawing, source: str) -> bytes:
    """A PNG file that says within itself how it was made, as those of `sample.py` do."""
    wish = drawing.wish
    facts = {
        "checkpoint": source,
        "sampler": drawing.sampler,
        "seed": wish.seed,
        "network_calls": round(drawing.calls, 4),
        "guidance": wish.guidance,
        "subjects": list(drawing.subjects),
    }
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=described(facts), optimize=True)
    return buffer.getvalue()


def of_figure(figure: Figure) -> Image.Image:
    """A plot as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _row_name(subject: int | str, names: Sequence[str]) -> str:
    text = names[subject] if isinstance(subject, int) and subject < len(names) else str(subject)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
