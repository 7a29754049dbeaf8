"""Whether weights are those of a network: names, shapes, kinds of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.plain import bare
from flowanchor.checkpoints.outline import outline
from flowanchor.errors import CheckpointError
from flowanchor.interfaces import Backbone
from flowanchor.weights import dtype_of, kind_of, shape_of


@dataclass(frozen=True)
class Fit:
    """How weights compare with the network that their names and shapes describe."""

    matched: int
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    reshaped: tuple[str, ...]  # name: shape there, shape wanted

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unknown or self.reshaped)


def compare(weights: Mapping[str, Tensor], config: Mapping[str, Any], source: object = "The description") -> Fit:
    """Build the network of a file without values and compare name by name."""
    return fit_of(outline(config, source, weights), weights)


def fit_of(network: Backbone, weights: Mapping[str, Tensor]) -> Fit:
    """Compare the names and shapes of a network, with or without values, with those of weights."""
    ours = network.state_dict()
    both = [key for key in ours if key in weights]
    reshaped = [key for key in both if ours[key].shape != shape_of(weights, key)]
    return Fit(
        len(both) - len(reshaped),
        tuple(key for key in ours if key not in weights),
        tuple(key for key in weights if key not in ours),
        tuple(f"{key} {by(shape_of(weights, key))}, wanted {by(ours[key].shape)}" for key in reshaped),
    )


def by(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"


def describe_misfit(fit: Fit) -> str:
    """In words, the first few of each kind."""
    found = (("lacks", fit.missing), ("has the unknown", fit.unknown), ("has another shape of", fit.reshaped))
    return ", ".join(
        f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in found
        if keys
    )


def check_fit(
    backbone: Backbone, weights: Mapping[str, Tensor], source: str | Path, optional: tuple[str, ...] = ()
) -> None:
    """Raise `CheckpointError` unless the names, shapes and kinds of numbers are those of a network."""
    ours = backbone.state_dict()
    missing = [key for key in ours if key not in weights and not key.startswith(optional or ("\0",))]
    unexpected = [key for key in weights if key not in ours]
    shared = [key for key in ours if key in weights]
    reshaped = [key for key in shared if ours[key].shape != shape_of(weights, key)]
    others = [key for key in shared if kind_of(ours[key].dtype) != kind_of(dtype_of(weights, key))]
    faults = (missing, unexpected, reshaped, others)
    words = ("lacks", "has the unknown", "has another shape of", "has other numbers than floating-point ones in")
    for what, keys in zip(words, faults, strict=True):
        if keys:
            listed = ", ".join(bare(key) for key in keys[:3])
            listed += f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{source} does not fit this {type(backbone).__name__}: it {what} {listed}; "
                "use the backbone settings it was trained with."
            )
