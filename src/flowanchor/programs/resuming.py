"""What a resumed run takes from its checkpoint, and which of its settings are new."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowanchor.checkpoints import read_checkpoint
from flowanchor.checkpoints.resuming import check_resumable
from flowanchor.provenance import differences

_SHOWN = 6  # changed settings that a line names


@dataclass(frozen=True)
class EarlierPart:
    """A run as its checkpoint tells it."""

    file: Path
    step: int
    meta: Mapping[str, Any]  # what the checkpoint says of itself
    config: Mapping[str, Any]  # the settings that its last steps were made with

    @classmethod
    def read(cls, file: Path) -> EarlierPart:
        content = read_checkpoint(file)
        check_resumable(content, file)
        meta = content["flowanchor"]
        config = copy.deepcopy(meta["config"])
        states = content.get("optimizer_states")
        if "run" not in meta and states and isinstance(config.get("optimizer"), dict):
            # Files of before such settings took effect on a resume tell what was typed; their groups, what was used.
            used = states[0]["param_groups"][0]
            config["optimizer"] |= {key: _plain(used[key]) for key in config["optimizer"] if key in used}
        return cls(file, int(meta["step"]), meta, config)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that a resume changes: dotted name -> what they were and are."""
    return {name: {"was": was, "is": new} for name, (was, new) in differences(before, now).items()}


def unchanged_settings(before: Mapping[str, Any], now: Mapping[str, Any], group: str) -> set[str]:
    """The settings of a group that are what they were."""
    theirs, ours = before.get(group) or {}, now.get(group) or {}
    return {name for name in ours if name in theirs and theirs[name] == ours[name]}


def described(changed: Mapping[str, Mapping[str, Any]]) -> str:
    """Changed settings in one line."""
    listed = [f"{name}={_shown(values['is'])} (was {_shown(values['was'])})" for name, values in changed.items()]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
