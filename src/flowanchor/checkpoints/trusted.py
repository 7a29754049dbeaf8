"""Building objects from a config that came out of a checkpoint: only code of this project and of installed plugins."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from flowanchor.errors import CheckpointError

PLUGIN_GROUP = "flowanchor.plugins"


def trusted_packages() -> set[str]:
    """`flowanchor` and the top-level packages that installed plugins registered."""
    return {"flowanchor"} | {point.value.partition(":")[0].split(".")[0] for point in entry_points(group=PLUGIN_GROUP)}


def instantiate_trusted(config: Any) -> Any:
    """`hydra.utils.instantiate`, refusing `_target_`s outside the trusted packages (a checkpoint is data, not code)."""
    from hydra.utils import instantiate

    allowed = trusted_packages()
    for target in _targets(config):
        package = target.split(".")[0]
        if package not in allowed:
            raise CheckpointError(
                f"The checkpoint asks for '{target}', and neither flowanchor nor an installed plugin ships "
                f"'{package}': install the plugin it was trained with, or do not use this file."
            )
        if not _is_ours(target, allowed):
            raise CheckpointError(
                f"The checkpoint asks for '{target}', which is no class of flowanchor or of an installed plugin: "
                "use the version it was trained with, or do not use this file."
            )
    return instantiate(config, _convert_="all")


def _is_ours(target: str, allowed: set[str]) -> bool:
    """Whether a target is a class, or a constructor of a class, that a trusted package defines itself.

    The name alone says little: `flowanchor.provenance.subprocess.Popen` begins with a trusted package as well.
    """
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:  # whatever a plugin raises on import
        return False
    owner = getattr(found, "__self__", found)  # the class of a class method
    return isinstance(owner, type) and owner.__module__.split(".")[0] in allowed


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "_target_":
                yield str(value)
            yield from _targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from _targets(value)
