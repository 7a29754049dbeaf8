"""A run that trains, seen from outside: its folder is read, and nothing in it is written, locked or asked."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from flowanchor.errors import DataError
from flowanchor.reporting.plots import loss_figure
from flowanchor.reporting.runs import Run, find_runs

CURVES = Path("csv") / "metrics.csv"


@dataclass(frozen=True)
class Glance:
    """What a run's folder tells at one time.

    Attributes:
        state: one line: where it is, how fast, when something was last written.
        scores: rows of name, step or evaluations, value.
        pictures: its sample grids, the newest last.
    """

    run: Run
    state: str
    scores: tuple[tuple[str, str, str], ...]
    pictures: tuple[Path, ...]

    def losses(self) -> Figure | None:
        """Losses against steps; None before the first."""
        return loss_figure({self.run.folder.name: self.run.series}) if self.run.series else None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, begun or finished."""
    if (folder / CURVES).is_file():
        return True
    try:
        settings = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return all(re.search(rf"^{part}:", settings, re.MULTILINE) for part in ("objective", "trainer"))


def glance(folder: Path) -> Glance:
    """Read a run's folder; raises `DataError` where it is none (any more)."""
    found = [run for run in find_runs([folder]) if run.folder.resolve() == folder.resolve()]
    if not found:
        raise DataError(f"{folder} is not the folder of a training run: give one that train.py has written.")
    run = found[0]
    return Glance(run, _state(run), tuple(_scores(run)), tuple(sorted((folder / "samples").glob("step_*.png"))))


def fingerprint(folder: Path) -> tuple[object, ...]:
    """Changes when there is something new to see; a stat of few files, so that a run is left its processor."""
    watched = [folder / CURVES, folder / "samples", *folder.glob("eval*/**/metrics.json")]
    return tuple((str(path), *_stat(path)) for path in watched)


def picture(path: Path) -> Image.Image | None:
    """A sample grid; None while it is being written, or gone."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # of which Pillow raises any for files that are cut off
        return None


def _state(run: Run) -> str:
    parts = [run.state]
    speed = run.series.get("images_per_second", ([], []))[1]
    if speed:
        parts.append(f"{speed[-1]:.0f} images/s")
    if run.skipped:
        parts.append(f"{run.skipped} steps skipped")
    changed = _stat(run.folder / CURVES)[0]
    if changed:
        ago = max(0.0, time.time() - changed / 1e9)
        parts.append(f"last row {_ago(ago)} ago")
    return ", ".join(parts)


def _scores(run: Run) -> Sequence[tuple[str, str, str]]:
    rows = []
    for name in ("train/loss", "val/loss", "train/grad_norm", "train/tangent_norm"):
        steps, values = run.series.get(name, ([], []))
        if values:
            rows.append((name, f"step {steps[-1]}", f"{values[-1]:.4g}"))
    for score in run.results:
        if score.fd is not None:
            spread = "" if score.spread is None else f" ± {score.spread:.2g}"
            rows.append((f"{score.kind.metric or 'FD'}, {score.kind.sampler or 'sampler unknown'}",
                         f"NFE {score.nfe}", f"{score.fd:.4g}{spread}"))  # fmt: skip
    return rows


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
