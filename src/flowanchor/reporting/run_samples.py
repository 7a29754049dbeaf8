"""What the runs drew, side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flowanchor.reporting.runs import Group, Run

LARGEST = 1400  # pixels of a side of a picture on a page: more makes the page heavy, and shows nothing


@dataclass(frozen=True)
class Drawn:
    """The newest grid of samples of one run of a kind."""

    caption: str
    picture: Image.Image
    alike: tuple[str, ...]


def newest_pictures(groups: Sequence[Group]) -> list[Drawn]:
    """Of each kind the picture of the first run that has one; files that are no pictures are passed over."""
    found = []
    for group in groups:
        for run in group.runs:
            picture = None if run.picture is None else _open(run.picture)
            if picture is not None:
                found.append(Drawn(_caption(group, run), picture, run.drawn_alike))
                break
    return found


def about(drawn: Sequence[Drawn]) -> str:
    """Whether the pictures can be compared one by one."""
    alike = {(picture.alike, picture.picture.height) for picture in drawn}
    if len(drawn) == 1:
        return "The newest grid of samples, not chosen."
    if len(alike) == 1 and drawn[0].alike:
        how = "All were drawn of the same noise and classes: compare pictures at the same place."
    else:
        how = "Not all were drawn of the same noise and classes: compare the look, not pictures at the same place."
    return f"The newest grid of samples of each kind, not chosen. {how}"


def _caption(group: Group, run: Run) -> str:
    step = re.search(r"\d+", run.picture.stem) if run.picture is not None else None
    parts = [group.short or group.label]
    parts += [f"seed {run.seed}"] if len(group.runs) > 1 else []
    parts += [f"step {int(step[0]):,}"] if step is not None else []
    return ", ".join(parts)


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):  # half-written, or no picture
        return None
    picture.thumbnail((LARGEST, LARGEST))
    return picture
