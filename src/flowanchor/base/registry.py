"""Which classes a file may name: those that an option of flowanchor, or of an installed plugin package, names.

An option is a YAML file in the conf/ folder; the folder that it lies in is the place in a configuration where it goes,
so a class that is registered as a backbone may not stand where a sampler is wanted. The files are read; no package is
imported in order to find out whether it may be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from flowanchor.base.moved import current_name as current_name
from flowanchor.base.plugins import own_conf, plugin_folders


def registered(place: str) -> frozenset[str]:
    """The names that may stand as `_target_` at a place, such as `backbone` or `objective.interval`."""
    known = _registered(tuple(sys.path))
    return frozenset(known.get(place, ()))


@lru_cache(maxsize=4)
def _registered(search_path: tuple[str, ...]) -> dict[str, set[str]]:
    """All of them, by place; of the packages that can be found in `search_path` (which is `sys.path`)."""
    known: dict[str, set[str]] = {}
    for folder in (own_conf(), *(folder for _, folder in plugin_folders(warn=False))):
        for file in sorted(folder.glob("*/**/*.yaml")):
            for place, target in _named(file, folder):
                known.setdefault(place, set()).update((target, *_class_of(target)))
    return known


def _named(file: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Places and targets in an option's file."""
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):  # Hydra will tell whoever chooses it
        return
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    start = ".".join(file.relative_to(folder).parent.parts)
    if package is not None and package[1] != "_group_":
        start = "" if package[1] == "_global_" else package[1]
    yield from _targets(content, start)


def _targets(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if isinstance(value.get("_target_"), str):
            yield place, value["_target_"]
        for key, inner in value.items():
            yield from _targets(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _targets(inner, f"{place}.*")


def _class_of(target: str) -> tuple[str, ...]:
    """The class of a constructor such as `package.Class.from_preset`."""
    owner = target.rpartition(".")[0]
    return (owner,) if owner.rpartition(".")[2][:1].isupper() else ()
