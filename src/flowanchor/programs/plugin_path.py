"""Options from other pip packages: an entry point in the group `flowanchor.plugins` names a package with conf/.

That folder is appended to Hydra's search path, so `backbone=theirs` finds conf/backbone/theirs.yaml of that package.
Where two folders hold the same option, flowanchor's own comes first.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from flowanchor.base.plugins import plugin_folders


class PluginPackages(SearchPathPlugin):
    """Appends the conf/ folder of every installed plugin package to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry_point, folder in plugin_folders():
            search_path.append(provider=entry_point.name, path=f"file://{folder}")


def register_plugin_path() -> None:
    """Make Hydra ask `PluginPackages`; calling it again changes nothing."""
    Plugins.instance().register(PluginPackages)
