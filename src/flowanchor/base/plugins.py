"""Where options live: the conf/ folder of flowanchor and of every installed plugin package. Nothing is imported."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

GROUP = "flowanchor.plugins"


def own_conf() -> Path:
    """The conf/ folder of flowanchor, of the checkout or of the wheel."""
    return _conf_folder("flowanchor")


def plugin_folders(warn: bool = True) -> list[tuple[EntryPoint, Path]]:
    """Entry points and their conf/ folders, by name; one that cannot be used is named in a warning and left out."""
    found = []
    for entry_point in sorted(entry_points(group=GROUP), key=lambda item: item.name):
        try:
            found.append((entry_point, _conf_folder(entry_point.module)))
        except Exception as error:  # a stranger's package fails in its own way, and must not stop a run without it
            owner = entry_point.dist.name if entry_point.dist is not None else "of unknown origin"
            advice = f"repair it, or pip uninstall {owner}"
            if warn:
                print(f"Warning: the plugin package {owner} is left out, because {error}; {advice}.", file=sys.stderr)
    return found


def _conf_folder(package: str) -> Path:
    top, *inner = package.split(".")
    spec = find_spec(top)  # of the outermost package, which is found without being run; an inner one would run it
    locations = [Path(place).joinpath(*inner) for place in (spec.submodule_search_locations or ())] if spec else []
    if not any(location.is_dir() for location in locations):
        raise ModuleNotFoundError(f"its entry point names {package}, which is not an importable package")
    for location in locations:
        if (location / "conf").is_dir():
            return location / "conf"
    raise FileNotFoundError(f"its package {package} has no conf/ folder (is it listed in the package data?)")
