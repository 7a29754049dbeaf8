"""How sure a score is: the same evaluation with several independent sets of samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# What a line of a report measures of its images; everything else describes it.
MEASURED = (
    "fd", "fd_at_floor_n", "sfid", "kid", "precision", "recall", "inception_score", "clip_score",
)  # fmt: skip


def repeated_seed(seed: int, repeat: int) -> int:
    """The seed of the noise and labels of a repetition; the first one has that of an evaluation without any."""
    return seed if repeat == 0 else int(np.random.SeedSequence((seed, repeat)).generate_state(1)[0])


def mean_line(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lines of independent sets as one: means of what was measured, `spread`: the standard deviations over the sets.

    `sets` holds the values of each set, in the order of `seeds`: two evaluations with the same seeds share their noise,
    and the differences of their sets are surer than those of their means. One line has neither.
    """
    first = lines[0]
    if len(lines) == 1:
        return {**first, "repeats": 1, "spread": None}
    values: dict[str, list[float]] = {}
    for name in MEASURED:
        found = [line.get(name) for line in lines]
        if None not in found:
            values[name] = [float(value) for value in found if value is not None]
    return {
        **first,
        **{name: statistics.fmean(found) for name, found in values.items()},
        "seconds": sum(line["seconds"] for line in lines),
        "repeats": len(lines),
        "seeds": [line["seed"] for line in lines],
        "spread": {name: statistics.stdev(found) for name, found in values.items()},
        "sets": values,
    }
