"""Quality against steps, where an evaluation lies beside a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flowanchor.base.files import read_note
from flowanchor.base.walk import walk
from flowanchor.reporting.measurements import Kind, names
from flowanchor.reporting.plots import QualityCurve, quality_figure

REPORT = "metrics.json"


def home_of(checkpoint: Path) -> Path:
    """The folder that a checkpoint belongs to: its run's, or the one that it was published in."""
    folder = checkpoint if checkpoint.is_dir() and checkpoint.suffix != ".ckpt" else checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """What eval.py has measured and left below a folder, the newest last; files that are half-written are left out."""
    found = [Path(entry.path) for entry in walk(folder, hidden=True) if entry.name == REPORT]
    dated = sorted((path.stat().st_mtime, path) for path in found if path.is_file())
    reports = [report for _, path in dated if (report := read_note(path)) is not None]
    return [report for report in reports if _is_whole(report)]


def quality(folder: Path) -> Figure | None:
    """Distances against network evaluations, a curve per way of measuring; None where nothing was measured."""
    points: dict[Kind, dict[int, tuple[float, float | None]]] = {}
    floors = []
    for report in evaluations(folder):
        if isinstance(report.get("floor"), Mapping) and isinstance(report["floor"].get("fd"), float):
            floors.append(report["floor"]["fd"])
        for line in report["results"]:
            if isinstance(line.get("nfe"), int) and isinstance(line.get("fd"), (int, float)):
                spread = (line.get("spread") or {}).get("fd")
                points.setdefault(Kind.of(line, report["settings"]), {})[line["nfe"]] = (line["fd"], spread)
    if not points:
        return None
    labels, metrics = names(points), {kind.metric or "FD" for kind in points}
    curves = []
    for kind, found in points.items():
        budgets = sorted(found)
        spread = [found[nfe][1] for nfe in budgets]
        known = [value for value in spread if value is not None]
        label = kind.sampler or labels[kind] if len(points) == 1 else labels[kind]
        fd = [found[nfe][0] for nfe in budgets]
        curves.append(QualityCurve(label, budgets, fd, known if len(known) == len(budgets) else ()))
    floor = floors[-1] if floors and len(set(floors)) == 1 else None
    return quality_figure(curves, metric=metrics.pop() if len(metrics) == 1 else "distance", floor=floor)


def _is_whole(report: Mapping[str, Any]) -> bool:
    results = report.get("results")
    return (
        isinstance(report.get("settings"), Mapping)
        and isinstance(results, list)
        and all(isinstance(line, Mapping) for line in results)
    )
