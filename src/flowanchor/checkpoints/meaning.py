"""Whether weights mean to a network what they meant to the one that was trained: what their shapes do not show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.base.plain import bare
from flowanchor.checkpoints.outline import outline
from flowanchor.errors import ConfigError, FlowAnchorError
from flowanchor.interfaces import Backbone


def check_meaning(student: Backbone, described: Mapping[str, Any], weights: Mapping[str, Tensor], file: Path) -> None:
    """Raise `ConfigError` where a student would start from weights of other settings (`Backbone.meaning`).

    `described`: the settings of their network, which is built without values. One that cannot be built is not asked:
    its weights are data all the same, and whether they predict the data is written down. Nor is one of another size:
    that is for `check_fit` to say.
    """
    try:
        network = outline(described, file, weights)
        sizes = {name: value.shape for name, value in network.state_dict().items()}
        if any(sizes.get(name, value.shape) != value.shape for name, value in student.state_dict().items()):
            return
        theirs = network.meaning()
    except FlowAnchorError:
        theirs = {"predicts": described.get("predicts") or "v"}
    for name, ours in student.meaning().items():
        if theirs.get(name, ours) != ours:
            setting, value = f"backbone.{name}" if name else "backbone", bare(theirs[name])
            raise ConfigError(
                f"{file} has {setting}={value}, and a network of {setting}={bare(ours)} cannot start from its "
                f"weights: set {setting}={value}, or initialise_from=null. As a teacher it may be of either kind."
            )
