"""Plots of quality and of training, drawn without a display."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from flowanchor.base.files import replacing
from flowanchor.errors import DataError

COLOURS = ("#4c4c4c", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d6a9f")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class QualityCurve:
    """Frechet distances of one model at several numbers of function evaluations."""

    name: str
    nfe: Sequence[int]
    fd: Sequence[float]
    spread: Sequence[float] = ()  # of each, over independent sets of samples; empty: not known


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window system, so that nothing global is touched."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(True, color="#e3e3e3", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=10)
    return figure, list(axes)


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers: 1, 2, 5, 10 ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def quality_figure(
    curves: Sequence[QualityCurve],
    metric: str = "FD",
    floor: float | None = None,
    title: str | None = None,
    size: tuple[float, float] = (6.2, 4.4),
) -> Figure:
    """Quality against network evaluations, both axes logarithmic; `floor` is real against real at the same N.

    `size` is width and height in inches, at 130 pixels each.
    """
    figure, (ax,) = new_figure(*size)
    budgets = sorted({int(n) for c in curves for n in c.nfe})
    for i, curve in enumerate(curves):
        points = sorted(zip(curve.nfe, curve.fd, curve.spread or [0.0] * len(curve.fd), strict=True))
        colour = COLOURS[i % len(COLOURS)]
        at, values, spread = zip(*points, strict=True)
        ax.plot(
            at, values, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=7, linewidth=1.8, label=curve.name
        )
        if curve.spread:
            ax.errorbar(at, values, yerr=spread, fmt="none", ecolor=colour, capsize=3)
        for nfe, fd, _ in points:
            aside = 6 if curve.spread else 0  # of the bars of the spread
            ax.annotate(
                f"{fd:.3g}", (nfe, fd), textcoords="offset points", ha="left" if aside else "center", fontsize=9,
                color=colour, xytext=(aside, 8 if i % 2 == 0 else -16),  # above and below: curves lie on each other
            )  # fmt: skip
    if floor is not None and floor > 0:
        ax.axhline(floor, color="#8a8a8a", linestyle="--", linewidth=1.3, label=f"held-out floor {floor:.3g}")
    ax.set_xscale("log")
    logarithmic(ax)
    ax.set_xticks(budgets, [str(n) for n in budgets])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(x=0.08, y=0.14)
    ax.set_xlabel("network evaluations per image (NFE)", fontsize=11)
    ax.set_ylabel(f"{metric}, lower is better", fontsize=11)
    ax.legend(fontsize=10, frameon=False)
    if title:
        ax.set_title(title, fontsize=12)
    return figure


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


def loss_figure(runs: Mapping[str, Mapping[str, tuple[list[int], list[float]]]], names: Sequence[str] = ()) -> Figure:
    """One panel per run: its training loss, terms and validation loss, against optimizer steps.

    `runs` maps a title to what `read_metrics` returns. `names` picks columns; by default `train/loss`, its terms
    `train/anchor` and `train/shortcut` where it has both, and `val/loss`.
    """
    figure, axes = new_figure(5.4 * len(runs), 3.8, columns=len(runs))
    for ax, (title, series) in zip(axes, runs.items(), strict=True):
        chosen = [n for n in (names or _losses(series)) if n in series]
        for i, name in enumerate(chosen):
            steps, values = series[name]
            validation = name.startswith("val/")
            label = name.removeprefix("train/") if not validation else f"validation {name.removeprefix('val/')}"
            ax.plot(
                steps, values, color=COLOURS[i % len(COLOURS)], linewidth=1.5, label=label,
                linestyle="--" if validation else "-", markersize=4,
                marker="o" if validation or len(steps) == 1 else None,
            )  # fmt: skip
        values = [v for n in chosen for v in series[n][1]]
        if values and min(values) > 0 and max(values) > 10 * min(values):  # a logarithmic axis needs a decade
            logarithmic(ax)
        ax.set_xlabel("optimizer step", fontsize=11)
        ax.set_ylabel("loss", fontsize=11)
        ax.set_title(title, fontsize=12)
        if chosen:
            ax.legend(fontsize=9, frameon=False)
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
