"""Options from other pip packages: an entry point in the group `flowanchor.plugins` names a package with conf/.

That folder is appended to Hydra's search path, so `backbone=theirs` finds conf/backbone/theirs.yaml of that package.
Where two folders hold the same option, flowanchor's own comes first.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP = "flowanchor.plugins"


class PluginPackages(SearchPathPlugin):
    """Appends the conf/ folder of every installed plugin package to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry_point, folder in plugin_folders():
            search_path.append(provider=entry_point.name, path=f"file://{folder}")


def plugin_folders() -> list[tuple[EntryPoint, Path]]:
    """Entry points and their conf/ folders, by name; one that cannot be used is named in a warning and left out."""
    found = []
    for entry_point in sorted(entry_points(group=GROUP), key=lambda item: item.name):
        try:
            found.append((entry_point, _conf_folder(entry_point.module)))
        except Exception as error:  # a stranger's package fails in its own way, and must not stop a run without it
            owner = entry_point.dist.name if entry_point.dist is not None else "of unknown origin"
            advice = f"repair it, or pip uninstall {owner}"
            print(f"Warning: the plugin package {owner} is left out, because {error}; {advice}.", file=sys.stderr)
    return found


def register_plugin_path() -> None:
    """Make Hydra ask `PluginPackages`; calling it again changes nothing."""
    Plugins.instance().register(PluginPackages)


def _conf_folder(package: str) -> Path:
    spec = find_spec(package)  # does not run the package: only the options that are used are imported
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"its entry point names {package}, which is not an importable package")
    for location in spec.submodule_search_locations:
        folder = Path(location) / "conf"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"its package {package} has no conf/ folder (is it listed in the package data?)")
