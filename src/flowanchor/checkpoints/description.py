"""What a checkpoint of ours says about itself: known to be what it should be before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from flowanchor.base.plain import bare, described, plain, shown
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.errors import CheckpointError
from flowanchor.weights import checked_weights

KINDS = ("flow", "shortcut")
CLASSES, LONGEST = 1_000_000, 200  # names of classes, and characters of one
_GROUPS = ("backbone", "objective", "sampler", "codec", "text_encoder", "data")
_SETTINGS = (dict, type(None))


def checked_content(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The entries of ours in a checkpoint, each of them known to be what it should be; nothing is built."""
    meta = plain(content["flowanchor"], file)
    if type(meta.get("format")) is not int or meta["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has checkpoint format {bare(meta.get('format'))} and this version reads {FORMAT}: "
            "use the flowanchor that wrote it."
        )
    lacking = [f"flowanchor.{key}" for key in ("config", "kind", "step") if key not in meta]
    lacking += [] if isinstance(content.get("state_dict"), Mapping) else ["state_dict"]
    if lacking:
        raise CheckpointError(
            f"{file} lacks {', '.join(lacking)}: give a .ckpt file that flowanchor-train has written."
        )
    if meta["kind"] not in KINDS:
        raise CheckpointError(f"{file} holds a network of an unknown kind ({shown(meta['kind'])}): do not use it.")
    if type(meta["step"]) is not int or not 0 <= meta["step"] < 2**53:
        raise CheckpointError(f"{file} says that it was trained for {shown(meta['step'])} steps: do not use it.")
    _check_groups(meta["config"], file)
    _check_names(meta.get("class_names", []), file)
    profiles = content.get("ema") or {}
    if not isinstance(profiles, dict) or not all(isinstance(name, str) for name in profiles):
        raise CheckpointError(f"{file} holds averages that are none (ema): do not use it.")
    averages = {name: checked_weights(weights, f"{file}: ema") for name, weights in profiles.items()}
    weights = checked_weights(content["state_dict"], f"{file}: state_dict")
    return {"flowanchor": meta, "state_dict": weights, **({"ema": averages} if "ema" in content else {})}


def _check_groups(config: Any, file: Path) -> None:
    """Raise `CheckpointError` where what describes a network, or its data, is no dictionary of settings."""
    odd = [name for name in _GROUPS if not isinstance(config, dict) or not isinstance(config.get(name, {}), _SETTINGS)]
    if odd:
        what = f"{odd[0]} is {described(config[odd[0]])}" if isinstance(config, dict) else f"it is {described(config)}"
        raise CheckpointError(
            f"{file} holds no configuration that can be used ({what}): give a .ckpt file that flowanchor-train has "
            "written."
        )


def _check_names(names: Any, file: Path) -> None:
    """Raise `CheckpointError` where the names of classes are no list of short texts, on one line each."""
    good = isinstance(names, list) and all(isinstance(n, str) and n.isprintable() and len(n) <= LONGEST for n in names)
    if not good or len(names) > CLASSES:
        raise CheckpointError(f"{file} holds names of classes that are none (class_names): do not use it.")


def named_classes(names: Sequence[str], classes: int) -> list[str]:
    """Names of classes as a file holds them; none where there is not one for each class."""
    if len(names) != classes:
        return []
    printable = ("".join(c if c.isprintable() else "?" for c in str(name)[:LONGEST]) for name in names)
    return [name.replace("${", "$ {") for name in printable]  # which no checkpoint may hold


def described_network(config: Mapping[str, Any], file: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a checkpoint describes its network, and the interval; raises `CheckpointError` where it does not."""
    backbone, interval = config.get("backbone"), (config.get("objective") or {}).get("interval")
    for settings in (backbone, interval):
        if not (isinstance(settings, dict) and isinstance(settings.get("_target_"), str)):
            raise CheckpointError(
                f"{file} holds no configuration of its network: give a .ckpt file that flowanchor-train has written."
            )
    return cast(dict[str, Any], backbone), cast(dict[str, Any], interval)
