"""Whether a checkpoint holds what a training needs to go on, told before Lightning looks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowanchor.errors import CheckpointError

# What Lightning writes beside the weights, and its type.
_NEEDED = {
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def check_resumable(content: Mapping[str, Any], file: Path) -> None:
    """Raise `CheckpointError` where the state of the optimizer, or of the loops, is not in a checkpoint."""
    lacking = [key for key, kind in _NEEDED.items() if not isinstance(content.get(key), kind)]
    if not lacking:
        states = content["optimizer_states"]
        lacking = [] if states and all(_is_state(state) for state in states) else ["optimizer_states"]
    if lacking:
        raise CheckpointError(
            f"{file} holds weights but not the state of a training that could go on (it lacks {', '.join(lacking)}): "
            "start a new run from it with initialise_from=FILE and another name=NAME."
        )


def _is_state(state: Any) -> bool:
    if not (isinstance(state, dict) and isinstance(state.get("state"), dict)):
        return False
    groups = state.get("param_groups")
    return isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
