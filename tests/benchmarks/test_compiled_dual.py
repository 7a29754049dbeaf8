"""The benchmark of the dual pass, on a tiny network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "compiled_dual.py"), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "compiled_dual_cpu.json").read_text())
    assert len(record["rows"]) == 6 and all(value > 0 for row in record["rows"] for value in row["values"])
    assert {kind for found in record["measured"].values() for kind in found} == {"pytorch", "eager", "compiled"}
