"""Two experts that were distilled one after the other, as one network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowanchor.checkpoints.description import described_network
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.format import DescribedWeights
from flowanchor.checkpoints.read import read_checkpoint, select_weights
from flowanchor.errors import CheckpointError
from flowanchor.weights import Joined

PARTS = ("high", "low")
ONE, TWO = "flowanchor.plugins.backbones.wan.Wan", "flowanchor.plugins.backbones.wan_experts.WanExperts"


def join_experts(paths: Mapping[str, str], ema: str | None = None) -> DescribedWeights:
    """`{high: RUN, low: RUN}` -> both together, under the low-noise run's file.

    Raises `CheckpointError` unless both are Wans of one size, distilled up to the same boundary.
    """
    files = {part: find_checkpoint(paths[part]) for part in PARTS}
    contents = {part: read_checkpoint(file) for part, file in files.items()}
    configs = {part: content["flowanchor"]["config"] for part, content in contents.items()}
    chosen = {part: select_weights(contents[part], ema, files[part]) for part in PARTS}
    # A run of before the setting came has its default.
    backbones = {
        part: {"predicts": "v", **described_network(config, files[part])[0]} for part, config in configs.items()
    }
    for part in PARTS:
        if str(backbones[part].get("_target_")) not in (ONE, f"{ONE}.from_preset"):
            raise CheckpointError(f"{files[part]} holds no Wan: give two runs of backbone=wan.")
    if backbones["high"] != backbones["low"]:
        differing = [key for key in backbones["low"] if backbones["low"][key] != backbones["high"].get(key)]
        raise CheckpointError(f"The two experts are different networks ({', '.join(differing)}): they must be alike.")
    ends = [_boundaries(configs[part]) for part in PARTS]
    if ends[0] != ends[1] or len(ends[0]) != 1:
        raise CheckpointError(
            f"The experts were distilled with objective.shortcut.boundaries={list(ends[0])} and {list(ends[1])}: both "
            "need the same one, for example [0.125]."
        )
    settings = {**backbones["low"], "_target_": TWO, "boundary": 1 - ends[0][0]}
    settings.setdefault("preset", "A14B")  # every size of a run without a preset is written out
    bases = {part: configs[part].get("initialise_from") for part in PARTS}
    config = {**configs["low"], "backbone": settings, "initialise_from": bases}
    sources = {
        f"initialise_from.{part}": found["initialise_from"]
        for part in PARTS
        if "initialise_from" in (found := contents[part]["flowanchor"].get("sources") or {})
    }
    meta = {**contents["low"]["flowanchor"], "config": config, "sources": sources}
    names = {part: name for part, (name, _) in chosen.items()}
    if names["high"] != names["low"]:
        raise CheckpointError(
            f"The experts keep different averages ({names['high']}, {names['low']}): name one of both."
        )
    weights = Joined({f"{part}.": inner for part, (_, inner) in chosen.items()})
    return DescribedWeights(files["low"], weights, meta, names["low"])


def _boundaries(config: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the segments that a run was trained in; none where it does not say."""
    shortcut = config["objective"].get("shortcut")
    found = shortcut.get("boundaries") if isinstance(shortcut, dict) else None
    return tuple(one for one in found if isinstance(one, (int, float))) if isinstance(found, list) else ()
