"""An evaluation as a table on screen and as a plot of quality against NFE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table


def results_table(report: Mapping[str, Any]) -> Table:
    """One line per result of a `metrics.json`, with the circumstances of all of them in the caption."""
    settings, floor = report["settings"], report["floor"]
    metric = settings["metric"]
    table = Table(
        title=f"{metric} of {settings['checkpoint']}",
        caption=f"n = {settings['num_samples']}, {settings['protocol']} labels, seed {settings['seed']}, "
        f"EMA {settings['ema']}, step {settings['step']}, checkpoint {settings['checkpoint_hash']}\n"
        f"floor: {metric} of {floor['n']} held-out images of {settings['data']}; compare it with the column "
        f"n={floor['n']}, the score of so many samples",
        box=SIMPLE,  # eleven columns in 80 characters
        collapse_padding=True,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    shared = f"n={floor['n']}"
    for name in ("sampler", "NFE", "calls", metric, shared, "floor", "KID", "prec", "rec", "IS", "sec"):
        table.add_column(name, justify="left" if name == "sampler" else "right", overflow="fold")
    for line in report["results"]:
        table.add_row(
            line["sampler"],
            _number(line["nfe"], "d"),
            _number(line["network_calls"], "d"),
            _number(line["fd"], ".4g"),
            _number(line["fd_at_floor_n"], ".4g"),
            _number(line["floor"], ".4g"),
            _number(line["kid"], ".3g"),
            _number(line["precision"], ".2f"),
            _number(line["recall"], ".2f"),
            _number(line["inception_score"], ".3g"),
            _number(line["seconds"], ".1f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def quality_plot(report: Mapping[str, Any], path: Path) -> None:
    """Frechet distance against NFE, both axes logarithmic, the floor dashed."""
    settings, floor = report["settings"], report["floor"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in report["results"]:
        if result["nfe"] is not None and result["fd_at_floor_n"] is not None:
            lines.setdefault(result["sampler"], []).append((result["nfe"], result["fd_at_floor_n"]))
    for sampler, points in lines.items():
        nfe, distance = zip(*sorted(points), strict=True)
        axes.plot(nfe, distance, marker="o", label=sampler)
    if floor["fd"] is not None:
        axes.axhline(floor["fd"], color="gray", linestyle="--", label="floor: held-out images")
    axes.set_xscale("log", base=2)
    if all(value > 0 for points in lines.values() for _, value in points) and (floor["fd"] or 0) > 0:
        axes.set_yscale("log")
    ticks = sorted({nfe for points in lines.values() for nfe, _ in points})
    axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
    axes.minorticks_off()
    axes.set_xlabel("NFE (velocity evaluations per sample)")
    axes.set_ylabel(f"{settings['metric']} (n={floor['n']})")
    axes.set_title(f"{settings['checkpoint_hash']}, EMA {settings['ema']}, {settings['protocol']} labels", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=150)


def finite_or_none(value: Any) -> Any:
    """A structure with every number that is not finite replaced by None: JSON has no name for them."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite_or_none(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
