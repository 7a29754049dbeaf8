"""Which process this is, and of how many, as launchers (torchrun, Lightning, Slurm) write it into the environment."""

from __future__ import annotations

import os

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them, in its order
PLACES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # 0 in each, or not there, of the one that speaks for all


def this_process() -> tuple[int, int]:
    """The number of this process under torchrun, and how many there are: (0, 1) where nothing is written."""
    return int(os.environ.get("RANK", 0)), process_count() or 1


def process_count() -> int | None:
    """How many processes there are, where that is written."""
    written = os.environ.get("WORLD_SIZE")
    return int(written) if written else None


def rank() -> int | None:
    """The number of this process, as Lightning finds it; None where no launcher has written one."""
    found = (os.environ.get(name, "") for name in RANKS)
    return next((int(value) for value in found if value.isdigit()), None)


def local_rank() -> str | None:
    """The number of this process on its machine; None where no launcher has written it."""
    return os.environ.get("LOCAL_RANK")


def is_first() -> bool:
    """Whether this is the only process of its run, or the one that speaks for all, by all that is written."""
    return all(os.environ.get(place, "0") == "0" for place in PLACES)
