"""What one more block adds to Chain's peak beyond the gradients of its parameters, in tensors of tokens [B, N, D].

The gradients exist before the step here, so that they are no part of the peaks.
"""

from __future__ import annotations

from typing import Any

from harness import Claim, Row, memory
from workloads import REFERENCE

NAME = "growth"
DEPTHS = (6, 12, 18)


def measure(rounds: int, size: dict[str, Any]) -> Claim:
    size = {"batch": 8, **REFERENCE, **size}
    cases = {str(n): {"engine": "Chain(recompute)", "accumulate": True, **size, "depth": n} for n in DEPTHS}
    found = memory("workloads:engine_step", cases)
    tokens = (size["input_size"] // size["patch_size"]) ** 2
    token_tensor = 4 * size["batch"] * tokens * size["hidden_size"]
    shallow, deep = found[str(DEPTHS[0])], found[str(DEPTHS[-1])]
    scale = (DEPTHS[-1] - DEPTHS[0]) * token_tensor
    grown = tuple((deep[kind] - shallow[kind]) / scale for kind in ("process", "counted"))
    rows = [Row("Chain(recompute), growth per block", "tensors B x N x D: process, counted", grown, 1.5)]
    return Claim(rows, {"peaks": found, "token_tensor_bytes": token_tensor})
