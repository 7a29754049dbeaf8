"""An evaluation as a table on screen and as a plot of quality against NFE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.box import SIMPLE
from rich.table import Table

from flowanchor.base.files import replacing


def results_table(report: Mapping[str, Any]) -> Table:
    """One line per result of a `metrics.json`, with the circumstances of all of them in the caption."""
    settings, floor, metric = report["settings"], report["floor"], report["settings"]["metric"]
    spatial = any(line.get("sfid") is not None for line in report["results"])
    table = Table(
        title=f"{metric} of {settings['checkpoint']}",
        caption="\n".join(_circumstances(report)),
        box=SIMPLE,  # eleven columns in 80 characters
        collapse_padding=True,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    columns = [("NFE", "nfe", "d"), ("calls", "network_calls", "d"), (metric, "fd", ".4g")]
    if floor is not None:
        columns += [(f"n={floor['n']}", "fd_at_floor_n", ".4g"), ("floor", "floor", ".4g")]
    if spatial:
        columns += [(f"s{metric}", "sfid", ".4g")]
    columns += [("KID", "kid", ".3g"), ("prec", "precision", ".2f"), ("rec", "recall", ".2f")]
    for name, key in (("IS", "inception_score"), ("CLIP", "clip_score")):
        if any(line.get(key) is not None for line in report["results"]):
            columns += [(name, key, ".3g")]
    columns += [("sec", "seconds", ".1f")]
    table.add_column("sampler", justify="left", overflow="fold")
    for name, _, _ in columns:
        table.add_column(name, justify="right", overflow="fold")
    for line in report["results"]:
        table.add_row(line["sampler"], *(_number(line.get(key), form) for _, key, form in columns))
    return table


def _circumstances(report: Mapping[str, Any]) -> Iterator[str]:
    """What has to stand beside the numbers, line by line."""
    settings, floor, metric = report["settings"], report["floor"], report["settings"]["metric"]
    yield (
        f"n = {settings['num_samples']}, {_asked(settings)}, seed {settings['seed']}, "
        f"EMA {settings['ema']}, step {settings['step']}, checkpoint {settings['checkpoint_hash']}"
    )
    reference, extractor = settings["reference"], settings["extractor"]
    count = "statistics" if reference["n"] is None else f"{reference['n']} images"
    yield (
        f"against {reference['name']} ({count}, {reference['hash']}), "
        f"extractor {extractor['name']} {extractor['digest']}"
    )
    if floor is not None:
        yield (
            f"floor: {metric} of {floor['n']} held-out images of {settings['data']}; compare it with the column "
            f"n={floor['n']}, the score of so many samples"
        )
    for why in dict.fromkeys(reference["missing"].values()):
        names = ", ".join(name for name, reason in reference["missing"].items() if reason == why)
        yield f"no {names}: {why}"


def _asked(settings: Mapping[str, Any]) -> str:
    """What the samples were asked for by."""
    prompts = settings.get("prompts")
    if prompts is None:
        return f"{settings['protocol']} labels"
    return f"{prompts['n']} prompts of {Path(prompts['file']).name} ({prompts['hash']})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def quality_plot(report: Mapping[str, Any], path: Path) -> None:
    """Frechet distance against NFE, on a logarithmic axis where it spans a decade; at the floor's number of images."""
    settings, floor = report["settings"], report["floor"]
    score, n = ("fd", settings["num_samples"]) if floor is None else ("fd_at_floor_n", floor["n"])
    ground = None if floor is None else floor["fd"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in report["results"]:
        if result["nfe"] is not None and result[score] is not None:
            lines.setdefault(result["sampler"], []).append((result["nfe"], result[score]))
    for sampler, points in lines.items():
        nfe, distance = zip(*sorted(points), strict=True)
        axes.plot(nfe, distance, marker="o", label=sampler)
    if ground is not None:
        axes.axhline(ground, color="gray", linestyle="--", label="floor: held-out images")
    axes.set_xscale("log", base=2)
    shown = [value for points in lines.values() for _, value in points] + ([] if ground is None else [ground])
    if shown and max(shown) > 10 * min(shown) > 0:  # within a decade a logarithmic axis may bear no number
        axes.set_yscale("log")
    ticks = sorted({nfe for points in lines.values() for nfe, _ in points})
    axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("NFE (velocity evaluations per sample)")
    axes.set_ylabel(f"{settings['metric']} (n={n})")
    axes.set_title(
        f"{settings['checkpoint_hash']}, EMA {settings['ema']}, {_asked(settings)}\n"
        f"against {settings['reference']['name']} {settings['reference']['hash']}",
        fontsize=9,
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with replacing(path) as draft:
        figure.savefig(draft, dpi=150, format="png")


def finite_or_none(value: Any) -> Any:
    """A structure with every number that is not finite replaced by None: JSON has no name for them."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite_or_none(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
