"""The registered formats, and which of them knows a path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.base.registry import registered
from flowanchor.base.trusted import brief, build
from flowanchor.checkpoints.consolidated import is_consolidated
from flowanchor.checkpoints.format import Format
from flowanchor.checkpoints.sharded_folder import is_sharded
from flowanchor.errors import CheckpointError, FlowAnchorError


def formats() -> tuple[Format, ...]:
    """All of them, in the order in which they are shown a path (see `Format`)."""
    return _formats(tuple(sys.path))


def recognised(path: Path) -> bool:
    """Whether any format reads a path."""
    return any(one.recognises(path) for one in formats())


def format_of(path: Path) -> Format:
    """The format that reads a path; raises `CheckpointError` where none recognises it."""
    found = next((one for one in formats() if one.recognises(path)), None)
    if found is None:
        names = ", ".join(one.name for one in formats())
        raise CheckpointError(f"{path} is of no format that is known here ({names}): give a released checkpoint.")
    return found


def in_place(path: Path) -> Format | None:
    """The format that opens a path where it lies; None for what is flowanchor's own, or nobody's."""
    if path.suffix == ".ckpt" or is_sharded(path) or is_consolidated(path):
        return None  # without a look at the formats, which takes a second
    return next((one for one in formats() if one.in_place and one.recognises(path)), None)


@lru_cache(maxsize=4)
def _formats(search_path: tuple[str, ...]) -> tuple[Format, ...]:
    names = sorted(registered("format"), key=lambda name: (not name.startswith("flowanchor."), name))
    return tuple(sorted((made for name in names for made in _made(name)), key=lambda one: one.broad))


def _made(target: str) -> Iterator[Format]:
    try:
        yield build({"_target_": target}, "format", "An option of format")
    except FlowAnchorError as error:  # a stranger's package must not stop those who do not use it
        why = brief(error.__cause__ or error)
        rank_zero_warn(f"The format {target} is left out ({why}): repair its package, or uninstall it.")
