"""A whole FACM step (teacher with guidance, anchor, shortcut) on Chain's settings, against the same step on Full."""

from __future__ import annotations

from typing import Any

from harness import Claim, Row, peak, readings, speed

NAME = "facm_step"
BARS = {"Chain(recompute)": (1.1, 1 / 5), "Chain(recompute=False)": (1.0, 0.55), 'Chain("selective")': (None, None)}


def measure(rounds: int, size: dict[str, Any]) -> Claim:
    cases = {name: {"engine": name, **size} for name in ("Full", *BARS)}
    found = readings("facm:facm_step", cases, rounds)
    rows: list[Row] = []
    for name, (time, memory) in BARS.items():
        what = f"FACM step, {name} / Full"
        rows += [speed(what, found[name], found["Full"], time), peak(what, found[name], found["Full"], memory)]
    return Claim(rows, found)
