"""Many runs side by side: one table (mean and spread over the seeds), curves, and a self-contained page."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from flowanchor.base.files import replacing, write_json, write_whole
from flowanchor.reporting.html import Page
from flowanchor.reporting.measurements import Kind, names
from flowanchor.reporting.plots import COLOURS, MARKERS, logarithmic, new_figure
from flowanchor.reporting.runs import Group, Run, Score, group_runs

CURVES = {"train/loss": "training loss", "train/tangent_norm": "tangent norm"}


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
    figures = {"curves": curves_figure(groups), "quality": quality_figure(rows)}
    page = Page(title).paragraph(
        f"{len(runs)} runs of {len(groups)} kinds. Numbers are means over the runs of a kind, with the standard "
        "deviation over their seeds; losses and tangent norms are of the last tenth of the logged steps."
    )
    if len({row["objective"] for row in rows}) > 1:
        page.paragraph("Losses of different objectives are different quantities: compare them along a curve only.")
    page.heading("Table").table(display(rows))
    for name, heading in (("quality", "Quality"), ("curves", "Training")):
        figure = figures[name]
        if figure is not None:
            with replacing(folder / f"{name}.png") as draft:
                figure.savefig(draft, format="png")
            page.heading(heading).picture(figure)
    page.heading("Runs").table([_line(group.label, run) for group in groups for run in group.runs])
    page.save(folder / "report.html")
    return rows


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


def curves_figure(groups: Sequence[Group]) -> Figure | None:
    """Training loss and tangent norm against steps, a colour per kind and a line per run; None without any curve."""
    shown = [name for name in CURVES if any(run.series.get(name) for group in groups for run in group.runs)]
    if not shown:
        return None
    figure, axes = new_figure(6.2 * len(shown), 4.2, columns=len(shown))
    for ax, name in zip(axes, shown, strict=True):
        positive = True
        for i, group in enumerate(groups):
            for j, run in enumerate(group.runs):
                steps, values = run.series.get(name, ([], []))
                positive &= all(value > 0 for value in values)
                ax.plot(
                    steps, values, color=COLOURS[i % len(COLOURS)], linewidth=1.2, alpha=0.8,
                    label=group.label if j == 0 else None, marker="o" if len(steps) == 1 else None,
                )  # fmt: skip
        if positive:
            logarithmic(ax)
        ax.set_xlabel("optimizer step", fontsize=11)
        ax.set_ylabel(CURVES[name], fontsize=11)
    _legend_below(figure, axes[0])
    return figure


def _legend_below(figure: Figure, ax: Axes) -> None:
    """Below the axes, where long names hide no curve."""
    handles, labels = ax.get_legend_handles_labels()
    short = [textwrap.shorten(label, 90, placeholder=" ...") for label in labels]
    columns = max(1, min(len(short), int(figure.get_figwidth() * 14 / max(map(len, short), default=1))))
    figure.legend(handles, short, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.18 * -(-len(short) // columns))


def quality_figure(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Frechet distance against NFE with its spread, a panel for each way of measuring; None without evaluations."""
    panels: dict[str, list[tuple[int, str]]] = {}
    for key in rows[0]:
        found = re.fullmatch(r"fd_(\d+)(?:: (.*))?", key)
        if found is not None and f"{key}_n" in rows[0]:
            panels.setdefault(found[2] or rows[0]["metric"] or "Frechet distance", []).append((int(found[1]), key))
    if not panels:
        return None
    figure, axes = new_figure(max(6.6, 5.0 * len(panels)), 4.6, columns=len(panels))
    for ax, (metric, columns) in zip(axes, panels.items(), strict=True):
        for i, row in enumerate(rows):
            points = [(nfe, row[key], row[f"{key}_spread"]) for nfe, key in columns if row[key] is not None]
            nfe, distance, spread = zip(*points, strict=True) if points else ((), (), ())
            ax.errorbar(
                nfe, distance, yerr=[s or 0.0 for s in spread], color=COLOURS[i % len(COLOURS)], capsize=3,
                marker=MARKERS[i % len(MARKERS)], linewidth=1.6, label=row["label"],
            )  # fmt: skip
        ax.set_xscale("log")
        logarithmic(ax)
        budgets = [nfe for nfe, _ in columns]
        ax.set_xticks(budgets, [str(nfe) for nfe in budgets])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.1, y=0.12)
        ax.set_xlabel("network evaluations per image (NFE)", fontsize=11)
        ax.set_ylabel(f"{metric}, lower is better", fontsize=11 if len(metric) < 40 else 8)
    _legend_below(figure, axes[0])
    return figure


def _heading(name: str, metric: str | None) -> str:
    """`fd_2: FD-digits, n=50` reads "FD-digits, n=50, NFE 2"."""
    found = re.fullmatch(r"fd_(\d+)(?:: (.*))?", name)
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


def _line(label: str, run: Run) -> dict[str, Any]:
    return {
        "runs of": label,
        "seed": run.seed,
        "state": run.state,
        "skipped steps": run.skipped,
        "loss": run.last("train/loss"),
        "evaluated at NFE": ", ".join(str(nfe) for nfe in dict.fromkeys(line.nfe for line in run.results)),
        "folder": str(run.folder),
        "not readable": "; ".join(run.problems),
    }
