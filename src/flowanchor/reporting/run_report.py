"""Many runs side by side: one table (mean and spread over the seeds), curves, and a self-contained page."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from flowanchor.base.files import write_json, write_whole
from flowanchor.base.paths import from_here
from flowanchor.reporting.figures import (
    COLOURS,
    GREY,
    fit,
    labels,
    legend_below,
    new_figure,
    rasterise,
    side_by_side,
)
from flowanchor.reporting.grids import save_picture
from flowanchor.reporting.html import Page
from flowanchor.reporting.measurements import Kind, names
from flowanchor.reporting.plots import MANY, QualityCurve, draw_series, step_axis
from flowanchor.reporting.plots import quality_figure as score_figure
from flowanchor.reporting.run_samples import Drawn, about, newest_pictures
from flowanchor.reporting.runs import Group, Run, Score, group_runs

CURVES = {"train/loss": "training loss", "train/tangent_norm": "tangent norm"}
SCORE = r"fd_(\d+)(?:: (.*))?"  # a column of scores
PANEL = 5.4  # inches of a figure's width on the page: on a phone its letters are as large as the text
SHOWN = 6  # pictures that lie open; the others unfold
KEPT = ("runs of", "seed", "state", "loss", "folder")  # columns of the list of runs that are there even if empty


def summarise(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One row per group: seeds, state, last losses, and the Frechet distance at every NFE, each as mean and spread.

    A column `x` holds the mean over the runs that have the number, `x_spread` the standard deviation over them (for one
    run, that over the independent sets of an evaluation with `repeats`, or None), `x_n` how many they are. Scores that
    were measured in different ways have columns of their own; where one was measured twice, the newest counts.
    """
    scores = _scores(groups)
    rows = []
    for group in groups:
        metrics = {kind.metric for kind, _ in scores.values()}
        row: dict[str, Any] = {
            "label": group.label,
            "objective": group.runs[0].objective,
            "metric": metrics.pop() if len(metrics) == 1 else None,
            "runs": len(group.runs),
            "finished": sum(run.state == "finished" for run in group.runs),
            "skipped_steps": sum(run.skipped for run in group.runs),
        }
        columns: dict[str, Callable[[Run], float | None]] = {
            "loss": lambda run: run.last("train/loss"),
            "tangent_norm": lambda run: run.last("train/tangent_norm"),
            "val_loss": lambda run: run.last("val/loss", share=0),
            **{key: _measured(kind, nfe) for key, (kind, nfe) in scores.items()},
        }
        for name, measure in columns.items():
            values = [value for run in group.runs if (value := measure(run)) is not None]
            row[name] = statistics.fmean(values) if values else None
            row[f"{name}_spread"] = (
                statistics.stdev(values) if len(values) > 1 else _own_spread(group, scores.get(name))
            )
            row[f"{name}_n"] = len(values)
        rows.append(row)
    return rows


def _scores(groups: Sequence[Group]) -> dict[str, tuple[Kind, int]]:
    """Columns of scores: `fd_2`, and `fd_2: what tells it apart` where scores were measured in several ways."""
    lines = [line for group in groups for run in group.runs for line in run.results]
    found = {(line.kind, line.nfe) for line in lines if line.nfe is not None and line.fd is not None}
    labels = names(kind for kind, _ in found)
    order = sorted(found, key=lambda item: (labels[item[0]], item[1]))
    several = len(labels) > 1
    return {f"fd_{nfe}: {labels[kind]}" if several else f"fd_{nfe}": (kind, nfe) for kind, nfe in order}


def _newest(run: Run, kind: Kind, nfe: int) -> Score | None:
    found = [line for line in run.results if (line.kind, line.nfe) == (kind, nfe) and line.fd is not None]
    return found[-1] if found else None


def _measured(kind: Kind, nfe: int) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        found = _newest(run, kind, nfe)
        return None if found is None else found.fd

    return measure


def _own_spread(group: Group, column: tuple[Kind, int] | None) -> float | None:
    """Of the only run that has the number: its spread over independent sets of samples."""
    found = [] if column is None else [line for run in group.runs if (line := _newest(run, *column)) is not None]
    return found[0].spread if len(found) == 1 else None


def write_report(runs: Sequence[Run], folder: Path, title: str) -> list[dict[str, Any]]:
    """Write table.json, table.md, curves.png, quality.png and report.html into a folder; returns the table's rows."""
    groups = group_runs(runs)
    rows = summarise(groups)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", rows)
    write_whole(folder / "table.md", markdown(rows))
    ranked = _best_first(groups, rows)
    quality = {name: rasterise(figure) for name, figure in quality_panels(groups, rows).items()}
    curves = {CURVES[name]: rasterise(figure) for name, figure in curve_panels(ranked).items()}
    for pictures, file in ((quality, "quality.png"), (curves, "curves.png")):
        if pictures:
            save_picture(side_by_side(list(pictures.values())), folder / file)
    _page(groups, rows, title, quality, newest_pictures(ranked), curves).save(folder / "report.html")
    return rows


def _page(
    groups: Sequence[Group],
    rows: Sequence[dict[str, Any]],
    title: str,
    quality: Mapping[str, Image.Image],
    drawn: Sequence[Drawn],
    curves: Mapping[str, Image.Image],
) -> Page:
    """Everything that is known, in itself: the numbers, how they came about, what was drawn, each run."""
    runs = sum(len(group.runs) for group in groups)
    page = Page(title).paragraph(
        f"{_count(runs, 'run')} of {_count(len(groups), 'kind')}. Numbers are means over the runs of a kind, with the "
        "standard deviation over their seeds, or of one run over the independent sets of its evaluation; losses and "
        "tangent norms are of the last tenth of the logged steps."
    )
    if len({row["objective"] for row in rows}) > 1:
        page.paragraph("Losses of different objectives are different quantities: compare them along a curve only.")
    called, heading = labels([group.short for group in groups])
    short = [{**line, "runs of": name} for line, name in zip(display(rows), called, strict=True)]
    scores_first = sorted(short[0], key=lambda key: (key != "runs of", ", NFE " not in key))  # what a phone shows of it
    heads = {key: key.replace("NFE ", "NFE\N{NO-BREAK SPACE}") for key in scores_first}
    heads["runs of"] = heading or "runs of"
    page.heading("Table").table(short, heads, best=_lowest(rows))
    if quality:
        page.heading("Quality").pictures(quality)
    if drawn:
        page.heading("Samples").paragraph(about(drawn))
        page.pictures([(one.picture, one.caption) for one in drawn], shown=SHOWN)
    if curves:
        page.heading("Training").pictures(curves)
    lines = [_line(group, run) for group in groups for run in group.runs]
    columns = {key: key for key in lines[0] if key in KEPT or any(line[key] not in ("", None, 0) for line in lines)}
    return page.heading("Runs").table(lines, columns, cards=True, folded=len(lines) > 12)


def _best_first(groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> list[Group]:
    """Where there are more kinds than can be shown at once: by the first score in the table; as they are otherwise."""
    key = next((key for key in rows[0] if re.fullmatch(SCORE, key) and f"{key}_n" in rows[0]), None)
    if len(groups) <= MANY or key is None:
        return list(groups)
    score = [row[key] if _finite(row[key]) else math.inf for row in rows]
    return [groups[i] for i in sorted(range(len(groups)), key=lambda i: score[i])]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _lowest(rows: Sequence[dict[str, Any]]) -> set[tuple[int, str]]:
    """Which cell of each column of scores is the best one: (row, heading), where there are several to choose from."""
    found = set()
    for key in [key for key in rows[0] if re.fullmatch(SCORE, key) and f"{key}_n" in rows[0]]:
        values = {i: row[key] for i, row in enumerate(rows) if row[key] is not None and math.isfinite(row[key])}
        if len(values) > 1:
            best = min(values, key=lambda i: values[i])
            found.add((best, _heading(key, rows[best]["metric"])))
    return found


def display(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows as text, without columns that nobody has a number for."""
    columns = [key for key in rows[0] if f"{key}_n" in rows[0]]
    shown = [name for name in columns if any(row[name] is not None for row in rows)]
    several = len({row["objective"] for row in rows}) > 1
    return [
        {
            "runs of": row["label"],
            **({"objective": str(row["objective"])} if several else {}),
            "finished": f"{row['finished']} of {row['runs']}",
            **({"skipped steps": str(row["skipped_steps"])} if any(r["skipped_steps"] for r in rows) else {}),
            **{_heading(name, row["metric"]): _cell(row, name) for name in shown},
        }
        for row in rows
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a Markdown table."""
    lines = display(rows)
    heads = list(lines[0])
    body = [[line[head].replace("|", "\\|") for head in heads] for line in lines]
    rule = ["---"] * len(heads)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *body))


def curve_panels(groups: Sequence[Group]) -> dict[str, Figure]:
    """Training loss and tangent norm against steps, where there are any: a colour per kind, a line per run."""
    _, heading = labels([group.short for group in groups])
    panels = {}
    for name in CURVES:
        if _has_curve(groups, name):
            panels[name], (ax,) = new_figure(PANEL, 4.0)
            _draw_curves(ax, groups, name)
            legend_below(panels[name], ax, heading=heading)
    return panels


def _has_curve(groups: Sequence[Group], name: str) -> bool:
    values = (run.series.get(name, ([], []))[1] for group in groups for run in group.runs)
    return any(math.isfinite(value) for curve in values for value in curve)


def _draw_curves(ax: Axes, groups: Sequence[Group], name: str) -> None:
    """Of many kinds the first ones have a colour each, and the others are grey."""
    own = len(groups) if len(groups) <= MANY else MANY - 1
    called, _ = labels([group.short for group in groups])
    steps: list[int] = []
    values: list[float] = []
    others = f"{len(groups) - own} others"
    for i, group in enumerate(groups):
        label = called[i] if i < own else others
        for run in group.runs:
            at, curve = run.series.get(name, ([], []))
            finite = [value for value in curve if math.isfinite(value)]
            if not finite:
                continue
            draw_series(
                ax, at, curve, label=label, linewidth=1.4 if i < own else 0.8, alpha=0.9,
                color=COLOURS[i] if i < own else GREY, zorder=3 - i / len(groups),  # the first on top
            )  # fmt: skip
            steps, values = steps + at, values + finite
            label = ""  # said once
    fit(ax.yaxis, values, log=all(value > 0 for value in values), room=0.05)
    step_axis(ax, steps)
    ax.set_ylabel(CURVES[name], fontsize=11)


def _panels(groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, QualityCurve]]]:
    """What was measured in one way, but for the sampler -> the curves of the kinds that were, with the kind's place.

    A teacher's solver and its student's sampler are what is compared: they stand in one figure, and their names beside
    the curves where there are several.
    """
    scores = _scores(groups)
    titles = names(replace(kind, sampler=None) for kind, _ in scores.values())
    panels: dict[str, list[tuple[int, QualityCurve]]] = {}
    for alike, title in titles.items():
        here = {key: (kind, nfe) for key, (kind, nfe) in scores.items() if replace(kind, sampler=None) == alike}
        samplers = sorted({kind.sampler or "" for kind, _ in here.values()})
        for i, (group, row) in enumerate(zip(groups, rows, strict=True)):
            for sampler in samplers:
                points = [
                    (nfe, row[key], row[f"{key}_spread"] or 0.0)
                    for key, (kind, nfe) in here.items()
                    if (kind.sampler or "") == sampler and _finite(row[key])
                ]
                if points:
                    name = f"{group.short}, {sampler}" if len(samplers) > 1 and sampler else group.short
                    panels.setdefault(title, []).append((i, QualityCurve(name, *zip(*points, strict=True))))
    return panels


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def quality_panels(groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Frechet distance against NFE with its spread, a figure for each way of measuring."""
    return {
        name: score_figure(
            [curve for _, curve in curves], name, size=(PANEL, 4.2), colours=[COLOURS[i % MANY] for i, _ in curves]
        )
        for name, curves in _panels(groups, rows).items()
    }


def _heading(name: str, metric: str | None) -> str:
    """`fd_2: FD-digits, n=50` reads "FD-digits, n=50, NFE 2"."""
    found = re.fullmatch(SCORE, name)
    return (
        f"{found[2] or metric or 'FD'}, NFE {found[1]}"
        if found
        else name.replace("_", " ").replace("val loss", "val. loss")
    )


def _cell(row: dict[str, Any], name: str) -> str:
    value, spread, count = row[name], row[f"{name}_spread"], row[f"{name}_n"]
    if value is None:
        return "-"
    text = f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread:.2g}"
    return text if count == row["runs"] else f"{text} (of {count})"


def _line(group: Group, run: Run) -> dict[str, Any]:
    return {
        "runs of": group.short,
        "settings": " ".join(run.overrides),
        "seed": run.seed,
        "state": run.state,
        "skipped steps": run.skipped,
        "loss": run.last("train/loss"),
        "evaluated at NFE": ", ".join(str(nfe) for nfe in dict.fromkeys(line.nfe for line in run.results)),
        "folder": str(from_here(run.folder)),
        "not readable": "; ".join(run.problems),
    }
