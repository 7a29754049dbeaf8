"""README.md of a published model: what it is, how to use it, and what eval.py measured, if it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from flowanchor.base.plain import read_json
from flowanchor.base.registry import current_name, registered
from flowanchor.base.trusted import build
from flowanchor.checkpoints.outline import outline
from flowanchor.conditioning import NoCondition
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Sampler

# Columns of the table, where eval.py's report has them.
_SCORES = {
    "fid": "FID", "fd": "FD", "sfid": "sFID", "inception_score": "IS", "kid": "KID", "precision": "precision",
    "recall": "recall", "clip_score": "CLIP score",
}  # fmt: skip
_COLUMNS = {"sampler": "sampler", "nfe": "NFE", **_SCORES, "n": "images", "protocol": "protocol", "seed": "seed"}


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


def model_card(
    name: str,
    meta: Mapping[str, Any],
    ema: str,
    report: Mapping[str, Any] | None,
    weights: Mapping[str, Tensor],
    with_codec: bool = False,
) -> str:
    """The text; numbers come from `report` (`read_metrics`) alone.

    Args:
        meta, weights: of the network, as a checkpoint has them.
        with_codec: whether the codec's weights are published with it.
    """
    config = meta["config"]
    backbone, codec = config["backbone"], config.get("codec") or {}
    network = outline(backbone, name, weights) if current_name(backbone["_target_"]) in registered("backbone") else None
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
        f"| samples | {_samples(network)} |",
        f"| codec | {codec.get('name') or 'none: pixels'} |",
        f"| interval | `{config['objective']['interval']['_target_'].rpartition('.')[2]}` |",
        f"| sampler | {_sampler(config.get('sampler'), name)} |",
        "",
        *_use(config, network, with_codec),
        "",
        "## Evaluation",
        "",
        *(_evaluation(report) if report is not None else ["Not measured."]),
    ]
    return "\n".join(lines) + "\n"


def _samples(network: Backbone | None) -> str:
    if network is None:
        return "those of its plugin package"
    known = "unconditional" if isinstance(network.conditioning, NoCondition) else network.conditioning.described()
    return f"{' x '.join(map(str, network.sample_shape))}, {known}"


def _sampler(settings: Mapping[str, Any] | None, name: str) -> str:
    """How its images are drawn unless somebody chooses."""
    target = (settings or {}).get("_target_")
    if not target:
        return "not known: choose one"
    if current_name(target) not in registered("sampler"):
        return f"`{target.rpartition('.')[2]}`"
    sampler: Sampler = build(settings, "sampler", name)
    return f"{sampler.told()}; NFE {'adaptive' if sampler.nfe is None else sampler.nfe}"


def _use(config: Mapping[str, Any], network: Backbone | None, with_codec: bool) -> Iterator[str]:
    """The call that draws images, with what must be given because it is not published."""
    prompt = "" if network is None else network.conditioning.example
    parts = ["sampler", "codec", *(["text_encoder"] if prompt else [])]
    missing = [part for part in parts if not (config.get(part) or {}).get("_target_")]
    if missing:
        chosen = " ".join(f"{part}=NAME" for part in missing)
        yield f"Its {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not known: choose, for example"
        yield from ("", "```bash", f"flowanchor-sample checkpoint=path/of/this/folder {chosen}", "```")
        return
    elsewhere = [part for part in parts if "weights" in config[part] and not (part == "codec" and with_codec)]
    given = "".join(f', {part}={{"weights": "path/of/its/weights"}}' for part in elsewhere)
    yield from ("```python", "import flowanchor", "", f'model = flowanchor.load("path/of/this/folder"{given})')
    yield from (f"images = model.sample({prompt}num_samples=8)  # uint8 [8, H, W, C]", "```")


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
