"""Weights and networks in words, line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from flowanchor.checkpoints.fit import Fit

_SHOWN = 20  # names of each kind


def count(weights: Mapping[str, Tensor]) -> str:
    """How many tensors and numbers, and of which types."""
    types = Counter(str(weights[name].dtype).removeprefix("torch.") for name in weights)
    numbers = sum(weights[name].numel() for name in weights)
    return f"{len(weights)} tensors, {numbers:,} numbers, {', '.join(sorted(types))}"


def network_lines(backbone: Mapping[str, Any]) -> Iterator[str]:
    settings = [f"{key}={value}" for key, value in backbone.items() if key != "_target_" and value is not None]
    yield f"  backbone     {backbone.get('_target_', 'not described')}"
    for first in range(0, len(settings), 6):
        yield f"               {' '.join(settings[first : first + 6])}"


def fit_lines(fit: Fit) -> Iterator[str]:
    yield f"  matched      {fit.matched} of {fit.matched + len(fit.missing) + len(fit.reshaped)} names and shapes"
    yield from listed("missing", fit.missing)
    yield from listed("unknown", fit.unknown)
    yield from listed("other shape", fit.reshaped)


def listed(title: str, names: tuple[str, ...]) -> Iterator[str]:
    for name in names[:_SHOWN]:
        yield f"  {title:<12} {name}"
    if len(names) > _SHOWN:
        yield f"  {title:<12} and {len(names) - _SHOWN} more"
