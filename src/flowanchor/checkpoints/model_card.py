"""README.md of a published model: what it is, how to use it, and what eval.py measured, if it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowanchor.base.plain import read_json
from flowanchor.errors import ConfigError

# Columns of the table, where eval.py's report has them.
_COLUMNS = {
    "sampler": "sampler", "nfe": "NFE", "fid": "FID", "fd": "FD", "sfid": "sFID", "inception_score": "IS",
    "kid": "KID", "precision": "precision", "recall": "recall", "n": "images", "protocol": "protocol", "seed": "seed",
}  # fmt: skip
_SCORES = ("fid", "fd", "sfid", "inception_score", "kid", "precision", "recall")


def read_metrics(path: str | Path, digest: str, ema: str) -> dict[str, Any]:
    """A `metrics.json` of eval.py, which must be about these weights; raises `ConfigError` else."""
    path = Path(path).expanduser()
    try:
        report = read_json(path, ConfigError)
        settings, results = report["settings"], report["results"]
        measured = (str(settings["checkpoint_hash"]), str(settings["ema"]))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path}: give the metrics.json that eval.py wrote.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no metrics.json of eval.py: give the file that it wrote.") from error
    if measured != (digest[:12], ema) or not results:
        raise ConfigError(
            f"{path} is about the weights {measured[1]} of checkpoint {measured[0]}, and these are {ema} of "
            f"{digest[:12]}: evaluate this checkpoint with python src/eval.py checkpoint=... first."
        )
    return report


def model_card(name: str, meta: Mapping[str, Any], ema: str, report: Mapping[str, Any] | None) -> str:
    """The text; numbers come from `report` (`read_metrics`) alone."""
    config = meta["config"]
    backbone, codec = config["backbone"], config.get("codec") or {}
    kind = "few-step shortcut (flow-anchored consistency)" if meta["kind"] == "shortcut" else "flow"
    front: dict[str, Any] = {"library_name": "flowanchor", "tags": ["image-generation", str(meta["kind"])]}
    if report is not None:
        front["model-index"] = [{"name": name, "results": list(_index(report))}]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {name}",
        "",
        f"A {kind} model of flowanchor, step {meta['step']}, weights `{ema}`.",
        "",
        "| | |",
        "|---|---|",
        f"| backbone | `{str(backbone.get('_target_')).removesuffix('.from_preset').rpartition('.')[2]}` |",
        f"| samples | {_samples(backbone)} |",
        f"| codec | {codec.get('name') or 'none: pixels'} |",
        f"| interval | `{config['objective']['interval']['_target_'].rpartition('.')[2]}` |",
        "",
        "```python",
        "import flowanchor",
        "",
        'model = flowanchor.load("path/of/this/folder")',
        "images = model.sample(num_samples=8)  # uint8 [8, H, W, C]",
        "```",
        "",
        "## Evaluation",
        "",
        *(_evaluation(report) if report is not None else ["Not measured."]),
    ]
    return "\n".join(lines) + "\n"


def _samples(backbone: Mapping[str, Any]) -> str:
    channels, size = backbone.get("in_channels"), backbone.get("input_size")
    classes = backbone.get("num_classes")
    return f"{channels} x {size} x {size}, {f'{classes} classes' if classes else 'unconditional'}"


def _evaluation(report: Mapping[str, Any]) -> Iterator[str]:
    settings, results = report["settings"], report["results"]
    columns = [key for key in _COLUMNS if any(line.get(key) is not None for line in results)]
    yield f"`{settings.get('metric')}` features on {settings.get('data')}, by `eval.py`:"
    yield ""
    yield f"| {' | '.join(_COLUMNS[key] for key in columns)} |"
    yield f"|{'---|' * len(columns)}"
    for line in results:
        yield f"| {' | '.join(_cell(line.get(key)) for key in columns)} |"


def _index(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    settings = report["settings"]
    data = str(settings.get("data"))
    for line in report["results"]:
        how = f"{line.get('sampler')}, NFE {line.get('nfe')}, {settings.get('metric')} features"
        scores = [
            {"type": key, "name": f"{_COLUMNS[key]} ({how})", "value": line[key]}
            for key in _SCORES
            if line.get(key) is not None
        ]
        yield {"task": {"type": "image-generation"}, "dataset": {"name": data, "type": data}, "metrics": scores}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
