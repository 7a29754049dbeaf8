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
    """How weights compare with the network that is to hold them, by name."""

    matched: int
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    reshaped: tuple[str, ...]  # name, shape there, shape wanted
    other_numbers: tuple[str, ...] = ()  # whole, complex or quantised ones in the place of floating-point ones

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unknown or self.reshaped or self.other_numbers)

    def misfit(self) -> str:
        """In words, the first few names of each kind."""
        found = {
            "lacks": [bare(key) for key in self.missing],
            "has the unknown": [bare(key) for key in self.unknown],
            "has another shape of": self.reshaped,
            "has other numbers than floating-point ones in": [bare(key) for key in self.other_numbers],
        }
        return ", ".join(
            f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            for what, keys in found.items()
            if keys
        )


def compare(weights: Mapping[str, Tensor], config: Mapping[str, Any], source: object = "The description") -> Fit:
    """Lay out the network of a description without values and compare it with weights."""
    return fit_of(outline(config, source, weights), weights)


def fit_of(network: Backbone, weights: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> Fit:
    """Compare names, shapes and kinds of numbers; names that start with one of `optional` need not be there."""
    ours = network.state_dict()
    both = [key for key in ours if key in weights]
    reshaped = [key for key in both if ours[key].shape != shape_of(weights, key)]
    return Fit(
        len(both) - len(reshaped),
        tuple(key for key in ours if key not in weights and not (optional and key.startswith(optional))),
        tuple(key for key in weights if key not in ours),
        tuple(f"{bare(key)} {sides(shape_of(weights, key))}, wanted {sides(ours[key].shape)}" for key in reshaped),
        tuple(key for key in both if kind_of(ours[key].dtype) != kind_of(dtype_of(weights, key))),
    )


def check_fit(
    backbone: Backbone, weights: Mapping[str, Tensor], source: str | Path, optional: tuple[str, ...] = ()
) -> None:
    """Raise `CheckpointError` unless weights are those of a network."""
    fit = fit_of(backbone, weights, optional)
    if not fit.complete:
        raise CheckpointError(
            f"{source} does not fit this {type(backbone).__name__}: it {fit.misfit()}; "
            "use the backbone settings it was trained with."
        )


def sides(shape: torch.Size) -> str:
    """A shape as it is read aloud: 3x4."""
    return "x".join(map(str, shape)) or "scalar"
