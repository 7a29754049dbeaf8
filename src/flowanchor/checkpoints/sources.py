"""Weights of other files that a run uses, known by what they hold: its teachers, and what it adapts or started from.

A path says little: the run behind it may have been trained on since. So a checkpoint keeps, for each setting that names
weights, `{"path": where they lay, "digest": sha256}` under `flowanchor.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object

from flowanchor.checkpoints.adapters import by_part
from flowanchor.checkpoints.base_lora import SETTING
from flowanchor.checkpoints.digest import file_digest
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import VelocityField

START = "initialise_from"
BEGINS = (START, SETTING)  # settings of the weights that a run starts from

Sources = dict[str, dict[str, str]]  # setting -> path, digest


def weight_settings(config: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The settings of a resolved configuration that name weights, with their paths.

    `own`: the configuration of the program that runs, where `config` is that of a file: the file's classes are not
    looked up.
    """
    teacher = config.get("teacher") or {}
    target = ((own or config).get("teacher") or {}).get("_target_")
    kind = get_object(target) if target else None
    names = kind.weights_from if isinstance(kind, type) and issubclass(kind, VelocityField) else ()
    found = {f"teacher.{name}": str(teacher[name]) for name in names if teacher.get(name)}
    found |= by_part(START, config[START]) if config.get(START) else {}
    return found | ({SETTING: str(config[SETTING])} if config.get(SETTING) else {})


def identify(paths: Mapping[str, str]) -> Sources:
    """Where the weights lie and what they are; large ones take a while. Raises `CheckpointError` where none are."""
    files = {name: find_checkpoint(path) for name, path in paths.items()}
    return {name: {"path": str(file.resolve()), "digest": file_digest(file)} for name, file in files.items()}


def resumed_sources(config: Mapping[str, Any], before: Mapping[str, Any], adapters: bool) -> Sources:
    """The sources of a run that goes on; raises `ConfigError` where they are not those of its checkpoint.

    Args:
        config: of the run.
        before: what the checkpoint says of itself; an older one knows paths alone.
        adapters: whether the weights that it started from are still in use, beside adapters.
    """
    paths, theirs = weight_settings(config), weight_settings(before["config"], config)
    recorded: Sources = before.get("sources") or {}
    for name in dict.fromkeys([*theirs, *paths]):
        if (name in paths) != (name in theirs):
            raise ConfigError(_changed(name, paths.get(name), theirs.get(name)))
    read = [name for name in paths if adapters or not name.startswith(BEGINS) or paths[name] != theirs[name]]
    found = identify({name: paths[name] for name in read})
    for name, source in found.items():
        wanted = recorded.get(name) or _identified(name, theirs[name])
        if wanted is None or (source["digest"] != wanted["digest"] and name.startswith(BEGINS) and not adapters):
            raise ConfigError(_changed(name, paths[name], theirs[name]))
        if source["digest"] != wanted["digest"]:
            raise ConfigError(
                f"{name}={paths[name]} holds other weights (sha256 {source['digest'][:12]}) than this run was trained "
                f"with (sha256 {wanted['digest'][:12]}): put those back, name where they lie, or pick another "
                "name=NAME for a new run."
            )
    return {**recorded, **found}


def _identified(name: str, path: str) -> dict[str, str] | None:
    try:
        return identify({name: path})[name]
    except CheckpointError:
        return None


def _changed(name: str, ours: str | None, theirs: str | None) -> str:
    effect = "has no effect on a run that goes on" if name.startswith(BEGINS) else "is another teacher"
    return (
        f"{name}={ours or 'null'} {effect}, and the run in this folder has {name}={theirs or 'null'}: repeat that to "
        "resume it, or pick another name=NAME for a new run."
    )
