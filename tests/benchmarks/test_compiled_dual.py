"""The benchmark of the dual pass, on a tiny network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

import compiled_dual
from workloads import dual_step

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "compiled_dual.py"), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "compiled_dual_cpu.json").read_text())
    assert len(record["rows"]) == 12 and all(value > 0 for row in record["rows"] for value in row["values"])
    assert {kind for found in record["measured"].values() for kind in found} == set(compiled_dual.KINDS)


def flops(kind: str, **size) -> int:
    work = dual_step(kind, **size)
    with FlopCounterMode(display=False) as counter:
        work.step()
    return counter.get_total_flops()


def test_what_no_compiler_saves_is_the_products_of_the_pass():
    """Values and tangents through every linear layer, counted by hand; and attention with six products for two."""
    batch, width, tokens, hidden, blocks = 2, 64, 16, 170, 2
    size = {"hidden_size": width, "num_heads": 4, "input_size": 4, "depth": blocks, "batch": batch}
    linear = 2 * batch * tokens * width * (4 * width + 3 * hidden) + 2 * batch * width * 6 * width
    times = 2 * batch * width * (256 + width)  # the embedding of the time, of 256 numbers
    assert flops("products", **size) == 2 * (blocks * linear + times)
    attention = 6 * 2 * batch * tokens**2 * width
    assert flops("floor", **size) == flops("products", **size) + blocks * attention


def test_ratios_are_of_medians():
    found = {"pytorch": [4.0], "eager": [1.0, 9.0, 2.0], "compiled": [1.5], "products": [1.0], "floor": [1.2]}
    rows = {row.claim: row for row in compiled_dual.compared("width 384, float32", found)}
    assert rows["dual pass, width 384, float32, compiled / eager"].values == (0.75,)
    assert rows["dual pass, width 384, float32, compiled / eager"].holds is False
    floor = rows["dual pass, width 384, float32, its products and attention alone / eager"]
    assert floor.values == (0.6,) and floor.holds is None
