"""A folder in the style of the Hugging Face hub: `config.json`, `model.safetensors`, `README.md`, `codec.safetensors`.

`config.json` says under `flowanchor` what a checkpoint of ours says about itself. It is data: what it asks to be built
must be a class of ours or of an installed plugin (`flowanchor.base.trusted`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from flowanchor.base.files import flush, remove, replace, unfinished
from flowanchor.base.plain import read_json
from flowanchor.checkpoints.consolidated import FORMAT, SUFFIX, read_consolidated, write_consolidated
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Codec

CONFIG, WEIGHTS, CARD, CODEC = "config.json", f"model{SUFFIX}", "README.md", f"codec{SUFFIX}"

# What a network needs to be opened, sampled and evaluated; the rest of a run's settings is not published.
_PUBLISHED = ("backbone", "sampler", "codec", "text_encoder", "data")


def is_published(path: str | Path) -> bool:
    """Whether a path is such a folder."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def read_safetensors(file: Path) -> dict[str, Any]:
    """A file of `write_consolidated` in the form of a checkpoint; a `config.json` of ours beside it has the last word.

    Raises `ValueError` for damaged weights, `CheckpointError` for a damaged `config.json`.
    """
    beside = file.parent / CONFIG
    described = _read_config(beside) if file.name == WEIGHTS and beside.is_file() else None
    return read_consolidated(file, described)


def _read_config(path: Path) -> dict[str, Any] | None:
    found = read_json(path)
    meta = found.get("flowanchor") if isinstance(found, dict) else None
    if not isinstance(meta, dict):
        return None
    config = meta.get("config")
    codec = config.get("codec") if isinstance(config, dict) else None
    if isinstance(codec, dict) and codec.get("weights") == CODEC:  # a name in this folder, and no other path
        codec["weights"] = str(path.parent / CODEC)
    return meta


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    ema: str,
    card: str,
    codec: Codec | None = None,
) -> None:
    """Write such a folder in one move.

    Args:
        meta: what a checkpoint has under `flowanchor`: config, kind, step.
        ema: which weights these are.
        card: the text of README.md.
        codec: a codec whose weights go along, or None.
    """
    config = {key: _without_paths(meta["config"][key]) for key in _PUBLISHED if key in meta["config"]}
    config["objective"] = {"interval": meta["config"]["objective"]["interval"]}
    if codec is not None:
        config["codec"] = {**config["codec"], "weights": CODEC}
    described = {"format": FORMAT, "kind": meta["kind"], "step": int(meta["step"]), "config": config, "ema": ema}
    if meta.get("class_names"):
        described["class_names"] = list(meta["class_names"])
    partial = unfinished(folder)
    remove(partial)
    partial.mkdir(parents=True)
    if codec is not None:
        try:
            codec.save(partial / CODEC)
        except ConfigError:  # it has nothing to save
            remove(partial)
            raise
    write_consolidated(partial / WEIGHTS, weights, described, ema)
    content = {"library_name": "flowanchor", "flowanchor": described}
    (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (partial / CARD).write_text(card, encoding="utf-8")
    flush(partial)
    replace(partial, folder)


def _without_paths(settings: Any) -> Any:
    """Settings without the paths of the machine that they come from."""
    if isinstance(settings, Mapping):
        return {key: _without_paths(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [_without_paths(value) for value in settings]
    if isinstance(settings, str) and (PurePath(settings).is_absolute() or "/" in settings or settings.startswith("~")):
        return settings if re.fullmatch(r"[A-Z0-9a-z]+/\d+", settings) else None  # a preset such as XL/2 is no path
    return settings


def local_folder(path_or_repo: str | Path) -> Path:
    """A path as it is, or the local copy of a repository of the hub, `org/name`.

    Only the files of such a folder are fetched. Raises `CheckpointError` where that fails.
    """
    path = Path(path_or_repo).expanduser()
    name = str(path_or_repo)
    if path.exists() or path.suffix in (SUFFIX, ".ckpt", ".pt") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    from huggingface_hub import snapshot_download  # takes a second to import

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, CODEC, CARD]))
    except Exception as error:  # of the network, of the service, of its client: all end in the same advice
        raise CheckpointError(
            f"There is nothing at {name}, and no repository of that name could be fetched ({type(error).__name__}): "
            "check the name, or give a folder."
        ) from error
