"""From the evaluations of the demo's two models to its results, samples, pictures and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flowanchor.base.files import write_json
from flowanchor.errors import DataError
from flowanchor.reporting.figures import rasterise
from flowanchor.reporting.grids import join, labelled_grid
from flowanchor.reporting.html import Page, Raw
from flowanchor.reporting.plots import QualityCurve, loss_figure, quality_figure, read_metrics

MAX_RATIO, MIN_GAIN = 1.35, 10.0
TITLES = {
    "teacher": "teacher (flow matching, Euler)",
    "teacher_midpoint": "teacher (flow matching, midpoint steps)",
    "facm": "FACM student",
}


@dataclass(frozen=True)
class Bar:
    """One claim of the demo, with its numbers."""

    claim: str
    value: float
    limit: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{'met   ' if self.met else 'MISSED'}  {self.claim}: {self.value:.3g} (bar {sign} {self.limit:.3g})"


@dataclass
class Demo:
    """What the demo's parts have left: model -> folder of its run; model, or model and solver, -> evaluation."""

    folder: Path
    runs: Mapping[str, Path]
    evaluations: Mapping[str, Path]
    seconds: Mapping[str, float] = field(default_factory=dict)  # part -> time it took
    settings: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    quick: bool = False

    def assemble(self) -> list[Bar]:
        """Write results.json, samples/, overview.png and report.html; return the bars."""
        metrics = {model: _read_json(folder / "metrics.json") for model, folder in self.evaluations.items()}
        results = self._results(metrics)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "results.json", results)
        samples = self._samples(results)
        bars = bars_of(results)
        self._overview(results, samples).save(self.folder / "overview.png")
        self._report(results, samples, bars, metrics).save(self.folder / "report.html")
        return bars

    # ---------------------------------------------------------------------------------------------------- numbers

    def _results(self, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A flat list, one entry per model and budget."""
        kept = ("metric", "checkpoint_hash", "step", "ema", "data", "protocol", "seed")
        return [
            {"model": model, **row, **{k: found["settings"][k] for k in kept if k in found["settings"]}}
            for model, found in metrics.items()
            for row in found["results"]
        ]

    def _samples(self, results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Path]:
        target = self.folder / "samples"
        target.mkdir(exist_ok=True)
        copied = {}
        for row in results:
            source = self.evaluations[row["model"]] / "samples" / f"nfe{row['nfe']}.npz"
            if not source.is_file():
                raise DataError(f"The evaluation has left no {source}: run it with save_samples=true.")
            copied[row["model"], row["nfe"]] = target / f"{row['model']}_nfe{row['nfe']}.npz"
            shutil.copyfile(source, copied[row["model"], row["nfe"]])
        return copied

    # --------------------------------------------------------------------------------------------------- pictures

    @staticmethod
    def _quality(results: Sequence[Mapping[str, Any]], size: tuple[float, float]) -> Figure:
        """Scores at the floor's N, where there are any: only those compare with it."""
        curves = []
        same_n = all(row.get("fd_at_floor_n") is not None for row in results)
        score, count = ("fd_at_floor_n", "floor_n") if same_n else ("fd", "n")
        for model in dict.fromkeys(row["model"] for row in results):
            rows = [row for row in results if row["model"] == model]
            spread = [r["spread"][score] for r in rows if r.get("spread")]
            curves.append(
                QualityCurve(TITLES.get(model, model), [r["nfe"] for r in rows], [r[score] for r in rows], spread)
            )
        first = results[0]
        title = f"{first.get('metric', 'FD')} of {first[count]:,} images on {first.get('data', 'digits')}"
        return quality_figure(curves, first.get("metric", "FD"), first.get("floor"), title, size)

    def _overview(self, results: Sequence[Mapping[str, Any]], samples: Mapping[tuple[str, int], Path]) -> Image.Image:
        wanted = [("teacher", 50), ("teacher", 1), ("facm", 1), ("facm", 2)]
        shown = [key for key in wanted if key in samples]
        grids = join([_grid(samples[key], per_class=5) for key in shown], [_title(*key) for key in shown])
        plot = rasterise(self._quality(results, (max(6.2, grids.width / 130), 3.9)))
        page = Image.new("RGB", (max(grids.width, plot.width), grids.height + plot.height), color=(255, 255, 255))
        page.paste(grids, ((page.width - grids.width) // 2, 0))
        page.paste(plot, ((page.width - plot.width) // 2, grids.height))
        return page

    def _report(
        self,
        results: Sequence[Mapping[str, Any]],
        samples: Mapping[tuple[str, int], Path],
        bars: Sequence[Bar],
        metrics: Mapping[str, Any],
    ) -> Page:
        page = Page("From a flow model to a one-step generator")
        page.paragraph(
            "A flow-matching teacher and the FACM student distilled from it, on scikit-learn's digits. The floor is "
            "what held-out real images score against the training images; lower is better."
        )
        if self.quick:
            page.paragraph(Raw("<strong>A quick run: trained far too short for the bars.</strong>"))
        page.heading("Bars")
        verdict = {True: Raw('<span class="good">met</span>'), False: Raw('<span class="bad">missed</span>')}
        page.table(
            [
                {
                    "claim": b.claim,
                    "value": b.value,
                    "bar": f"{'≤' if b.at_most else '≥'} {b.limit:g}",
                    "": verdict[b.met],
                }
                for b in bars
            ]
        )
        sets = max(row.get("repeats") or 1 for row in results)
        if sets > 1:
            page.paragraph(f"Means over {sets} independent sets of samples; ±: their standard deviation.")
        told = [{**row, "fd_spread": (row.get("spread") or {}).get("fd")} for row in results]
        page.heading("Scores").table(told, _columns(told))
        page.picture(self._quality(results, (8.0, 4.6)), "Quality against network evaluations, both axes logarithmic")
        page.heading("Samples").paragraph("One row per class; the first images of each evaluation, not chosen.")
        page.pictures({_title(*key): _grid(path, per_class=5) for key, path in samples.items()})
        curves = {TITLES.get(m, m): run / "csv" / "metrics.csv" for m, run in self.runs.items()}
        found = {title: read_metrics(path) for title, path in curves.items() if path.is_file()}
        if found:
            page.heading("Loss").picture(loss_figure(found), "Training loss with its terms, and validation loss")
        page.heading("Settings").settings(self.settings)
        for model, content in metrics.items():
            page.paragraph(f"Evaluation of the {TITLES.get(model, model)}").settings(content["settings"])
        if self.seconds:
            page.heading("Time").table([{"part": part, "seconds": round(s, 1)} for part, s in self.seconds.items()])
        if self.commands:
            page.heading("Commands").code("\n".join(self.commands))
        return page


def bars_of(results: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The demo's claims; one whose numbers were not evaluated is left out."""
    fd = {(row["model"], row["nfe"]): float(row["fd"]) for row in results}
    bars = []
    for nfe in (1, 2):
        if {("facm", nfe), ("teacher", 50)} <= fd.keys():
            claim = f"student FD at {nfe} step{'s' if nfe > 1 else ''} / teacher FD at 50 steps"
            bars.append(Bar(claim, fd["facm", nfe] / fd["teacher", 50], MAX_RATIO, at_most=True))
    if {("facm", 1), ("teacher", 1)} <= fd.keys():
        claim = "teacher FD at 1 step / student FD at 1 step"
        bars.append(Bar(claim, fd["teacher", 1] / fd["facm", 1], MIN_GAIN, at_most=False))
    return bars


def _columns(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names = {
        "model": "model", "sampler": "sampler", "nfe": "NFE", "network_calls": "network calls",
        "fd": str(results[0].get("metric", "FD")), "fd_spread": "±", "floor": "floor",
        "fd_at_floor_n": "at the floor's N", "n": "N",
        "kid": "KID", "precision": "precision", "recall": "recall", "inception_score": "inception score",
        "seconds": "seconds",
    }  # fmt: skip
    return {key: title for key, title in names.items() if any(row.get(key) is not None for row in results)}


def _title(model: str, nfe: int) -> str:
    if model == "teacher_midpoint":
        return f"teacher, {nfe // 2} midpoint step{'s' if nfe > 2 else ''}"
    return f"{'FACM student' if model == 'facm' else model}, {nfe} step{'s' if nfe > 1 else ''}"


def _grid(path: Path, per_class: int) -> Image.Image:
    """The first images of each class."""
    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    chosen = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)[:10]])
    return labelled_grid(images[chosen], labels[chosen], columns=per_class)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"There is no {path}: the evaluation has not finished; run the demo again to go on.")
    return json.loads(path.read_text(encoding="utf-8"))
