"""Many runs side by side: one table (mean and spread over the seeds), curves, and a self-contained page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from flowanchor.base.files import replacing, write_json, write_whole
from flowanchor.reporting.html import Page
from flowanchor.reporting.plots import COLOURS, MARKERS, new_figure
from flowanchor.reporting.runs import Group, Run, group_runs

CURVES = {"train/loss": "training loss", "train/tangent_norm": "tangent norm"}


def summarise(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One row per group: seeds, state, last losses, and the Frechet distance at every NFE, each as mean and spread.

    A column `x` holds the mean over the runs that have the number, `x_spread` the standard deviation over them (None
    for one run), `x_n` how many they are.
    """
    budgets = sorted({line["nfe"] for group in groups for run in group.runs for line in run.results if line.get("nfe")})
    rows = []
    for group in groups:
        row: dict[str, Any] = {
            "label": group.label,
            "runs": len(group.runs),
            "finished": sum(run.state == "finished" for run in group.runs),
            "skipped_steps": sum(run.skipped for run in group.runs),
        }
        columns: dict[str, Callable[[Run], float | None]] = {
            "loss": lambda run: run.last("train/loss"),
            "tangent_norm": lambda run: run.last("train/tangent_norm"),
            "val_loss": lambda run: run.last("val/loss", share=0),
            **{f"fd_{nfe}": _distance_at(nfe) for nfe in budgets},
        }
        for name, measure in columns.items():
            values = [value for run in group.runs if (value := measure(run)) is not None]
            row[name] = statistics.fmean(values) if values else None
            row[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
            row[f"{name}_n"] = len(values)
        rows.append(row)
    return rows


def _distance_at(nfe: int) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        found = [line["fd"] for line in run.results if line.get("nfe") == nfe and line.get("fd") is not None]
        return found[-1] if found else None

    return measure


def write_report(runs: Sequence[Run], folder: Path, title: str) -> list[dict[str, Any]]:
    """Write table.json, table.md, curves.png, quality.png and report.html into a folder; returns the table's rows."""
    groups = group_runs(runs)
    rows = summarise(groups)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", rows)
    write_whole(folder / "table.md", markdown(rows))
    figures = {"curves": curves_figure(groups), "quality": quality_figure(rows, _metric(runs))}
    page = Page(title).paragraph(
        f"{len(runs)} runs of {len(groups)} kinds. Numbers are means over the runs of a kind, with the standard "
        "deviation over their seeds; losses and tangent norms are of the last tenth of the logged steps."
    )
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
    names = [key for key in rows[0] if f"{key}_n" in rows[0]]
    shown = [name for name in names if any(row[name] is not None for row in rows)]
    return [
        {
            "runs of": row["label"],
            "finished": f"{row['finished']} of {row['runs']}",
            **({"skipped steps": str(row["skipped_steps"])} if any(r["skipped_steps"] for r in rows) else {}),
            **{_heading(name): _cell(row, name) for name in shown},
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
    names = [name for name in CURVES if any(run.series.get(name) for group in groups for run in group.runs)]
    if not names:
        return None
    figure, axes = new_figure(6.2 * len(names), 4.2, columns=len(names))
    for ax, name in zip(axes, names, strict=True):
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
            ax.set_yscale("log")
        ax.set_xlabel("optimizer step", fontsize=11)
        ax.set_ylabel(CURVES[name], fontsize=11)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def quality_figure(rows: Sequence[dict[str, Any]], metric: str) -> Figure | None:
    """Frechet distance against NFE with the spread over seeds; None where nothing was evaluated."""
    budgets = sorted(int(key[3:]) for key in rows[0] if key.startswith("fd_") and key[3:].isdigit())
    if not budgets:
        return None
    figure, (ax,) = new_figure(6.6, 4.6)
    for i, row in enumerate(rows):
        points = [(nfe, row[f"fd_{nfe}"], row[f"fd_{nfe}_spread"]) for nfe in budgets if row[f"fd_{nfe}"] is not None]
        if points:
            nfe, distance, spread = zip(*points, strict=True)
            ax.errorbar(
                nfe, distance, yerr=[s or 0.0 for s in spread], color=COLOURS[i % len(COLOURS)], capsize=3,
                marker=MARKERS[i % len(MARKERS)], linewidth=1.6, label=row["label"],
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(budgets, [str(nfe) for nfe in budgets])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("network evaluations per image (NFE)", fontsize=11)
    ax.set_ylabel(f"{metric}, lower is better", fontsize=11)
    ax.legend(fontsize=8, frameon=False)
    return figure


def _metric(runs: Sequence[Run]) -> str:
    found = {line["metric"] for run in runs for line in run.results if line.get("metric")}
    return found.pop() if len(found) == 1 else "Frechet distance"


def _heading(name: str) -> str:
    return f"FD, NFE {name[3:]}" if name.startswith("fd_") else name.replace("_", " ").replace("val loss", "val. loss")


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
        "evaluated at NFE": ", ".join(str(line.get("nfe")) for line in run.results),
        "folder": str(run.folder),
        "not readable": "; ".join(run.problems),
    }
