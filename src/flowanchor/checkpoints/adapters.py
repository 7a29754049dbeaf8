"""Weights that a checkpoint of adapters does not hold: the frozen ones of another checkpoint that they stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.checkpoints.base_lora import SETTING, with_base_lora
from flowanchor.checkpoints.digest import file_digest
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.outline import TooLarge, outline
from flowanchor.checkpoints.read import read_checkpoint, select_weights
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Backbone
from flowanchor.weights import Joined, Overlaid


def outlined(
    meta: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    file: Path,
    elsewhere: str | Path | Mapping[str, str] | None = None,
    base_lora: str | Path | None = None,
) -> tuple[Backbone, Mapping[str, Tensor], dict[str, str]]:
    """The network without values, all of its weights, and the digests of those that adapters stand beside.

    `elsewhere`, `base_lora`: as in `whole_weights`.
    """
    settings = meta["config"]["backbone"]
    try:
        shapes = outline(settings, file, weights)
    except TooLarge:
        if not (elsewhere or meta["config"].get("initialise_from")):
            raise
        shapes = outline(settings, file, weights, _base(meta, file, elsewhere)[0])
    return shapes, *whole_weights(shapes, weights, meta, file, elsewhere, base_lora)


def whole_weights(
    backbone: Backbone,
    weights: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    file: Path,
    elsewhere: str | Path | Mapping[str, str] | None = None,
    base_lora: str | Path | None = None,
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The weights of a whole network: those of `file` and, where it holds adapters alone, those that they stand beside.

    The latter are looked for where the run found them, or `elsewhere`, and so is the LoRA that was merged into them, or
    at `base_lora`; both are known by their digests.

    Returns them, and the sha256 of each file of the latter by its setting. Raises `CheckpointError` where they are not
    there, or are others than those that were trained with.
    """
    if all(name in weights for name in backbone.borrowed()):
        if elsewhere:
            raise ConfigError(f"{file} holds all its weights: leave out initialise_from={elsewhere}.")
        if base_lora:
            raise ConfigError(f"{file} holds all its weights: leave out {SETTING}={base_lora}.")
        return weights, {}
    below, digests = _base(meta, file, elsewhere)
    named = meta["config"].get(SETTING)
    if base_lora and not named:
        raise ConfigError(f"{file} was trained without {SETTING}: leave out {SETTING}={base_lora}.")
    if named:
        known = (meta.get("sources") or {}).get(SETTING) or {}
        places = [str(base_lora)] if base_lora else [named, *([known["path"]] if known else [])]
        found, digests[SETTING] = _find_base(file, SETTING, places, known.get("digest"))
        below = with_base_lora(backbone, below, meta["config"], found)
    return Overlaid(weights, below), digests


def _base(
    meta: Mapping[str, Any], file: Path, elsewhere: str | Path | Mapping[str, str] | None
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The weights that the adapters of a run stand beside, and their digests."""
    parts: dict[str, Mapping[str, Tensor]] = {}
    digests: dict[str, str] = {}
    recorded = meta.get("sources") or {}
    for name, typed in by_part("initialise_from", elsewhere or meta["config"].get("initialise_from")).items():
        known = recorded.get(name) or {}
        places = [typed] if elsewhere or not known else [typed, known["path"]]
        base, digests[name] = _find_base(file, name, places, known.get("digest"))
        parts[name.partition(".")[2]] = select_weights(read_checkpoint(base), None, base)[1]
    return parts[""] if "" in parts else Joined({f"{part}.": inner for part, inner in parts.items()}), digests


def by_part(setting: str, value: Any) -> dict[str, str]:
    """A setting that names weights, or those of each part of a network: dotted name -> path."""
    if isinstance(value, Mapping):
        return {f"{setting}.{part}": str(path) for part, path in value.items()}
    return {setting: "" if value is None else str(value)}


def _find_base(file: Path, name: str, places: list[str], wanted: str | None) -> tuple[Path, str]:
    """The first of the places that holds the weights of a digest, and that digest."""
    others = []
    for place in dict.fromkeys(places):
        try:
            base = find_checkpoint(place) if place else None
        except CheckpointError:
            base = None
        if base is not None:
            digest = file_digest(base)
            if wanted is None or digest == wanted:
                return base, digest
            others.append(f"{base} has sha256 {digest[:12]}")
    what = "the LoRA under them is" if name == SETTING else "the weights that they adapt are"
    changed = what.rpartition(" ")[0] + (" has" if name == SETTING else " have")
    reason = (
        f"{what} not where the run found them ({places[0] or None})"
        if not others
        else f"{changed} changed (sha256 {str(wanted)[:12]}; {', '.join(others)})"
    )
    raise CheckpointError(
        f"{file} holds adapters alone, and {reason}: put it back there, or say where it is with {name}=PATH."
    )
