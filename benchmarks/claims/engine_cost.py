"""One prediction with tangent and gradient: each engine against the whole-model JVP, and Chain against TwoPass."""

from __future__ import annotations

from typing import Any

from harness import Claim, Row, peak, readings, speed
from workloads import ENGINES

NAME = "engines"


def measure(rounds: int, size: dict[str, Any]) -> Claim:
    found = readings("workloads:engine_step", {name: {"engine": name, **size} for name in ENGINES}, rounds)
    full, chain, two = found["Full"], found["Chain(recompute)"], found["TwoPass(checkpoint)"]
    middle, graph = found['Chain("selective")'], found["Chain(recompute=False)"]
    rows: list[Row] = [
        speed("Chain(recompute) / Full", chain, full, 1.2),
        peak("Chain(recompute) / Full", chain, full, 1 / 7),
        speed("Chain(recompute) / TwoPass(checkpoint)", chain, two, 0.9),
        peak("Chain(recompute) / TwoPass(checkpoint)", chain, two, 1.0),
        speed('Chain("selective") / Full', middle, full, 1.08),
        peak('Chain("selective") / Full', middle, full, 1 / 4),
        speed("Chain(recompute=False) / Full", graph, full, 1.0),
        peak("Chain(recompute=False) / Full", graph, full, 0.5),
    ]
    return Claim(rows, found)
