"""What is generated for an evaluation: how many network calls, and which labels in which order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError

PROTOCOLS = ("balanced", "random")


def make_labels(protocol: str, num_samples: int, num_classes: int, seed: int) -> Tensor | None:
    """Labels [N] (int64), None for networks without classes.

    `balanced`: sample i has class `i % num_classes`, so that every prefix is as balanced as it can be. `random`: drawn
    independently with the seed. Published FID uses balanced labels; random ones score up to a tenth worse.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"There is no label protocol '{protocol}': use protocol={' or protocol='.join(PROTOCOLS)}.")
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples} is too few: for example num_samples=1000.")
    if num_classes == 0:
        return None
    if protocol == "balanced":
        return torch.arange(num_samples) % num_classes
    return torch.randint(num_classes, (num_samples,), generator=torch.Generator().manual_seed(seed))


def parse_nfe(value: Any) -> list[int | None]:
    """`1`, `"1,2"` or `[1, 2]` as a list; None (the sampler's own number of steps) as `[None]`."""
    if value is None:
        return [None]
    if isinstance(value, str):
        value = value.split(",")
    entries = [value] if isinstance(value, (int, float)) else list(value)
    numbers: list[int | None] = []
    for entry in entries:
        try:
            number = int(str(entry))
        except ValueError:
            number = 0
        if number < 1:
            raise ConfigError(
                f"nfe asks for '{str(entry).strip()}' network evaluations, which is not a whole number from 1: "
                "use for example nfe=[1,2,4]."
            )
        if number not in numbers:
            numbers.append(number)
    if not numbers:
        raise ConfigError("nfe=[] asks for nothing: use for example nfe=[1,2,4].")
    return numbers
