"""FACM's step sharded over two processes: its cost per sample, and what one joint walk of the student saves."""

from __future__ import annotations

import statistics
from typing import Any

from harness import Claim, Row, together

NAME = "sharded"


def measure(rounds: int, size: dict[str, Any]) -> Claim:
    size = dict(size)
    batch = size.pop("batch", 8)
    found = together(2, {"measure": "compare", "batch": batch, "rounds": rounds, "size": size})
    cost = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    gathers = {name: counts.get("all_gather", 0) for name, counts in found["collectives"].items()}
    per_sample = cost["joint walk"] / cost["one process"]
    one, two = gathers["joint walk"], gathers["two walks"]
    sharing = "FACM step on 2 processes, joint walk / two walks"
    rows = [
        Row("FACM step, FSDP on 2 processes / 1 process", "CPU time per sample", (per_sample,), 1.25),
        Row(sharing, "CPU time", (cost["joint walk"] / cost["two walks"],)),
        Row(sharing, f"all-gathers, {one} against {two}", (one / two,)),
    ]
    return Claim(rows, found)
