"""Attention's tangent for a long sequence: tiled in plain PyTorch against the formula with whole score matrices."""

from __future__ import annotations

from typing import Any

from harness import Claim, peak, readings, speed

NAME = "attention"


def measure(rounds: int, size: dict[str, Any]) -> Claim:
    size = {"tokens": 4096, "heads": 16, "head_size": 72, **size}
    found = readings(
        "workloads:attention_step", {kind: {"kind": kind, **size} for kind in ("math", "streaming")}, rounds
    )
    what = f"attention streaming / math, N = {size['tokens']}, {size['heads']} x {size['head_size']}"
    streaming, formula = found["streaming"], found["math"]
    return Claim([speed(what, streaming, formula, 1.2), peak(what, streaming, formula, 1 / 10)], found)
