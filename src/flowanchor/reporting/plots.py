"""Plots of quality and of training, drawn without a display."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowanchor.base.files import replacing
from flowanchor.errors import DataError
from flowanchor.reporting.figures import (
    COLOURS,
    MARKERS,
    fit,
    labels,
    legend_below,
    new_figure,
    shorten,
    ticks_at,
    write_values,
)

MANY = len(COLOURS)  # curves that can be told apart; more stand in a row each


@dataclass(frozen=True)
class QualityCurve:
    """Frechet distances of one model at several numbers of function evaluations."""

    name: str
    nfe: Sequence[int]
    fd: Sequence[float]
    spread: Sequence[float] = ()  # of each, over independent sets of samples; empty: not known

    @property
    def points(self) -> list[tuple[int, float, float]]:
        """NFE, distance and spread in the order of the NFE, without what is not finite."""
        found = zip(self.nfe, self.fd, self.spread or [0.0] * len(self.fd), strict=True)
        return sorted((n, fd, spread if math.isfinite(spread) else 0.0) for n, fd, spread in found if math.isfinite(fd))


def quality_figure(
    curves: Sequence[QualityCurve],
    metric: str = "FD",
    floor: float | None = None,
    title: str | None = None,
    size: tuple[float, float] = (6.2, 4.4),
    colours: Sequence[str] = COLOURS,
) -> Figure:
    """Quality against network evaluations, both axes logarithmic; `floor` is real against real at the same N.

    The legend lies below the axes, and every point has its value beside it. More than eight curves, or curves of one
    number of evaluations, are told in a row each, the best at the top. `size` is width and height in inches, at 130
    pixels each; the legend comes on top. `colours` has one for each curve, where there are at most eight.
    """
    budgets = {n for curve in curves for n, *_ in curve.points}
    if len(curves) > MANY or len(budgets) == 1:
        return _rows(curves, metric, floor, title, size[0])
    figure, (ax,) = new_figure(*size)
    shown: list[tuple[float, float, str, str]] = []
    names, heading = labels([curve.name for curve in curves])
    for i, (curve, name) in enumerate(zip(curves, names, strict=True)):
        colour, points = colours[i], curve.points
        at, values, spread = zip(*points, strict=True) if points else ((), (), ())
        ax.errorbar(
            at, values, yerr=spread if any(spread) else None, capsize=3, label=name, color=colour,
            marker=MARKERS[i % len(MARKERS)], markersize=6, linewidth=1.8,
        )  # fmt: skip
        shown += [(nfe, fd, plain_score(fd), colour) for nfe, fd, _ in points]
    _floor(ax, floor)
    fit(ax.yaxis, _reach(curves, floor), log=True)
    fit(ax.xaxis, sorted(budgets), log=True)
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * max(high / low, 1.0) ** 0.08)  # room for the last values
    ticks_at(ax.xaxis, sorted(budgets), narrow=True)
    ax.set_xlabel("network evaluations per image (NFE)", fontsize=11)
    _name_score(ax.set_ylabel, metric)
    if title:
        ax.set_title(title, fontsize=11)
    legend_below(figure, ax, heading=heading)
    if len(budgets) > 8:  # no room beside the points: the best of each
        shown = [min((point for point in shown if point[0] == n), key=lambda point: point[1]) for n in sorted(budgets)]
    write_values(ax, shown)
    return figure


def _rows(curves: Sequence[QualityCurve], metric: str, floor: float | None, title: str | None, width: float) -> Figure:
    """One row per curve, the lowest distance at the top; a marker per number of evaluations."""
    budgets = sorted({n for curve in curves for n, *_ in curve.points})
    best = [min((fd for _, fd, _ in curve.points), default=math.inf) for curve in curves]
    order = sorted(range(len(curves)), key=lambda i: best[i])
    names, heading = labels([curve.name for curve in curves], 30)
    figure, (ax,) = new_figure(width, 1.4 + 0.24 * len(curves))
    map_ = colormaps["viridis"]
    for k, nfe in enumerate(budgets):
        found = [(row, fd, s) for row, i in enumerate(order) for n, fd, s in curves[i].points if n == nfe]
        rows, values, spread = zip(*found, strict=True)
        colour = COLOURS[2] if len(budgets) == 1 else to_hex(map_(0.85 * k / max(1, len(budgets) - 1)))
        ax.errorbar(
            values, rows, xerr=spread if any(spread) else None, capsize=2.5, linestyle="none", color=colour,
            marker=MARKERS[k % len(MARKERS)], markersize=6, label=f"NFE {nfe}",
        )  # fmt: skip
    told = [(row, plain_score(best[i])) for row, i in enumerate(order) if math.isfinite(best[i])]
    for place, text in [*told, (-1, "lowest" if len(budgets) > 1 else "")]:
        ax.text(1.015, place, text, transform=ax.get_yaxis_transform(), fontsize=8.5, va="center")
    ax.text(-0.015, -1, heading, transform=ax.get_yaxis_transform(), fontsize=8.5, va="center", ha="right")
    if floor is not None and floor > 0:
        ax.axvline(floor, color="#8a8a8a", linestyle="--", linewidth=1.3, label=f"held-out floor {floor:.3g}")
    fit(ax.xaxis, _reach(curves, floor), log=True)
    ax.set_yticks(range(len(order)), [names[i] for i in order], fontsize=9)
    ax.set_ylim(len(order) - 0.4, -0.6)
    _name_score(ax.set_xlabel, metric)
    if title:
        ax.set_title(title, fontsize=11)
    legend_below(figure, ax)
    return figure


def _reach(curves: Sequence[QualityCurve], floor: float | None) -> list[float]:
    """Everything that must lie inside: values, the ends of their spread, the floor."""
    values = [fd for curve in curves for _, fd, _ in curve.points] + ([floor] if floor else [])
    ends = [fd + sign * spread for curve in curves for _, fd, spread in curve.points for sign in (-1, 1)]
    # A spread that reaches below 0 must not take the logarithm away.
    return values + [end for end in ends if end > 0.2 * min(values)]


def _floor(ax: Axes, floor: float | None) -> None:
    if floor is not None and floor > 0:
        ax.axhline(floor, color="#8a8a8a", linestyle="--", linewidth=1.3, label=f"held-out floor {floor:.3g}")


def _name_score(name_axis: Any, metric: str) -> None:
    """Long descriptions of a way of measuring in smaller letters, without their middle where they do not fit."""
    name_axis(f"{shorten(metric, 60)}, lower is better", fontsize=11 if len(metric) < 36 else 8.5)


def plain_score(value: float) -> str:
    """Three digits, and none after the point from 100 on."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def quality_plot(path: str | Path, curves: Sequence[QualityCurve], **options: Any) -> Path:
    """`quality_figure` into a PNG file."""
    return _save(quality_figure(curves, **options), path)


# ------------------------------------------------------------------------------------------------------------- curves


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """`metrics.csv` of a run -> name -> (steps, values); empty cells are left out."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"There is no {file}: train with logger=csv to get loss curves.")
    series: dict[str, tuple[list[int], list[float]]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name, cell in row.items():
                if name not in ("step", "epoch") and cell:
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(cell))
    return series


def step_axis(ax: Axes, steps: Sequence[int]) -> None:
    """The x axis of training: whole numbers of optimizer steps; one step alone stands between 0 and its double."""
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    if low == high:
        low, high = 0, max(1, 2 * high)
    ax.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.set_xlabel("optimizer step", fontsize=11)


def draw_series(ax: Axes, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A logged curve; of a long one the running mean is drawn strong over the values themselves, which are faint."""
    at, y = np.asarray(steps), np.asarray(values, dtype=float)
    seen = np.isfinite(y)
    if len(y) == 1 or seen.sum() == 1:
        style = {"marker": "o", "markersize": 5, **style}
    half = len(y) // 40
    if half < 1:
        ax.plot(at, np.where(seen, y, np.nan), **style)
        return
    ax.plot(at, np.where(seen, y, np.nan), **{**style, "label": None, "linewidth": 0.6, "alpha": 0.28})
    sums, counts = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(seen, y, 0.0), seen))
    first, last = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    mean = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    ax.plot(at, np.where(seen, mean, np.nan), **style)


def loss_figure(runs: Mapping[str, Mapping[str, tuple[list[int], list[float]]]], names: Sequence[str] = ()) -> Figure:
    """One panel per run: its training loss, terms and validation loss, against optimizer steps.

    `runs` maps a title to what `read_metrics` returns. `names` picks columns; by default `train/loss`, its terms
    `train/anchor` and `train/shortcut` where it has both, and `val/loss`.
    """
    figure, axes = new_figure(5.4 * len(runs), 3.8, columns=len(runs))
    chosen_of = [[n for n in (names or _losses(series)) if n in series] for series in runs.values()]
    every = list(dict.fromkeys(n for chosen in chosen_of for n in chosen))  # a colour each, the same in every panel
    for ax, (title, series), chosen in zip(axes, runs.items(), chosen_of, strict=True):
        for name in chosen:
            steps, values = series[name]
            validation = name.startswith("val/")
            label = name.removeprefix("train/") if not validation else f"validation {name.removeprefix('val/')}"
            draw_series(
                ax, steps, values, color=COLOURS[every.index(name) % MANY], linewidth=1.5, label=label,
                linestyle="--" if validation else "-", **({"marker": "o", "markersize": 4} if validation else {}),
            )  # fmt: skip
        values = [v for n in chosen for v in series[n][1] if math.isfinite(v)]
        if values:
            # A logarithmic axis is worth its ticks from a decade on.
            fit(ax.yaxis, values, log=min(values) > 0 and max(values) > 10 * min(values), room=0.06)
        step_axis(ax, [step for n in chosen for step in series[n][0]])
        ax.set_ylabel("loss", fontsize=11)
        ax.set_title(title, fontsize=12)
    legend_below(figure, *axes)
    return figure


def loss_plot(path: str | Path, runs: Mapping[str, Mapping[str, tuple[list[int], list[float]]]]) -> Path:
    """`loss_figure` into a PNG file."""
    return _save(loss_figure(runs), path)


def _losses(series: Mapping[str, Any]) -> list[str]:
    known = ("anchor", "shortcut")
    terms = [n for n in sorted(series) if n.startswith("train/") and n.removeprefix("train/") in known]
    if len(terms) == 1:  # a single term is the loss itself
        terms = []
    return ["train/loss", *terms, "val/loss"]


def _save(figure: Figure, path: str | Path) -> Path:
    target = Path(path)
    with replacing(target) as draft:
        figure.savefig(draft, format=target.suffix.removeprefix(".") or "png")
    return target
