"""An evaluation as a table on screen and as a plot of quality against NFE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from flowanchor.base.paths import from_here
from flowanchor.reporting.plots import QualityCurve
from flowanchor.reporting.plots import quality_plot as write_quality

SPREAD = ("fd", "fd_at_floor_n", "sfid")  # told with their spread; metrics.json has that of all


def results_table(report: Mapping[str, Any]) -> Table:
    """One line per result of a `metrics.json`, with the circumstances of all of them in the caption."""
    settings, floor, metric = report["settings"], report["floor"], report["settings"]["metric"]
    spatial = any(line.get("sfid") is not None for line in report["results"])
    table = Table(
        title=f"{metric} of {from_here(settings['checkpoint'])}",
        caption="\n".join(_circumstances(report)),
        box=SIMPLE,  # ten columns in 80 characters
        collapse_padding=True,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    more = any(line.get("network_calls") != line["nfe"] for line in report["results"])
    columns = [("NFE", "nfe", "d"), *([("calls", "network_calls", "d")] if more else []), (metric, "fd", ".4g")]
    if floor is not None:
        same = floor["n"] == settings["num_samples"]
        columns += [] if same else [(f"n={floor['n']}", "fd_at_floor_n", ".4g")]
        columns += [("floor", "floor", ".3g")]
    if spatial:
        columns += [(f"s{metric}", "sfid", ".4g")]
    columns += [("KID", "kid", ".3g"), ("prec", "precision", ".2f"), ("rec", "recall", ".2f")]
    for name, key in (("IS", "inception_score"), ("CLIP", "clip_score")):
        if any(line.get(key) is not None for line in report["results"]):
            columns += [(name, key, ".3g")]
    if settings.get("repeats", 1) == 1:  # the width is needed for the spreads
        columns += [("sec", "seconds", ".1f")]
    table.add_column("sampler", justify="left", overflow="fold")
    for name, _, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for line in report["results"]:
        table.add_row(line["sampler"], *(_cell(line, key, form) for _, key, form in columns))
    return table


def _cell(line: Mapping[str, Any], key: str, form: str) -> str:
    """A number, with its spread over independent sets where there are several."""
    spread = (line.get("spread") or {}).get(key)
    text = _number(line.get(key), form)
    return text if spread is None or key not in SPREAD else f"{text} ± {spread:.2g}"


def _circumstances(report: Mapping[str, Any]) -> Iterator[str]:
    """What has to stand beside the numbers, line by line."""
    settings, floor, metric = report["settings"], report["floor"], report["settings"]["metric"]
    yield (
        f"n = {settings['num_samples']}, {_asked(settings)}, seed {settings['seed']}, "
        f"EMA {settings['ema']}, step {settings['step']}, checkpoint {settings['checkpoint_hash']}"
    )
    if settings.get("repeats", 1) > 1:
        yield f"means over {settings['repeats']} independent sets of so many samples; ±: their standard deviation"
    reference, extractor = settings["reference"], settings["extractor"]
    count = "statistics" if reference["n"] is None else f"{reference['n']} images"
    yield (
        f"against {reference['name']} ({count}, {reference['hash']}), "
        f"extractor {extractor['name']} {extractor['digest']}"
    )
    if floor is not None:
        column = metric if floor["n"] == settings["num_samples"] else f"n={floor['n']}"
        yield (
            f"floor: {metric} of {floor['n']} held-out images of {settings['data']}; compare it with the column "
            f"{column}, the score of so many samples"
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
    """Frechet distance against NFE into a PNG file, a curve per sampler; at the floor's number of images."""
    settings, floor = report["settings"], report["floor"]
    score, n = ("fd", settings["num_samples"]) if floor is None else ("fd_at_floor_n", floor["n"])
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for result in report["results"]:
        if result["nfe"] is not None and result[score] is not None:
            spread = (result.get("spread") or {}).get(score) or 0.0
            lines.setdefault(result["sampler"], []).append((result["nfe"], result[score], spread))
    title = (
        f"{_short(settings['checkpoint'])}, step {settings['step']}, EMA {settings['ema']}, {_asked(settings)}\n"
        f"against {settings['reference']['name']} {settings['reference']['hash']}"
    )
    curves = [QualityCurve(sampler, *zip(*points, strict=True)) for sampler, points in lines.items()]
    write_quality(path, curves, metric=f"{settings['metric']} (n={n})", floor=floor and floor["fd"], title=title)


def _short(checkpoint: str) -> str:
    """A run by its name, a file by its own."""
    path = Path(checkpoint)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def finite_or_none(value: Any) -> Any:
    """A structure with every number that is not finite replaced by None: JSON has no name for them."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite_or_none(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
