"""The demo at full length meets its bars; some eight minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BUDGETS = {"teacher": [50, 8, 2, 1], "facm": [1, 2, 4]}


def check_demo(folder: Path) -> None:
    """What a demo at full length leaves in its folder."""
    results = json.loads((folder / "results.json").read_text())
    fd = {(row["model"], row["nfe"]): row["fd"] for row in results}
    assert set(fd) == {(model, nfe) for model, budgets in BUDGETS.items() for nfe in budgets}
    for model, nfe in fd:
        with np.load(folder / "samples" / f"{model}_nfe{nfe}.npz") as file:
            assert file["images"].shape == (1000, 8, 8, 1) and file["images"].dtype == np.uint8
            assert np.bincount(file["labels"], minlength=10).tolist() == [100] * 10
    assert all(row["floor"] > 0 and row["floor_n"] > 0 and row["n"] == 1000 for row in results)
    assert "<img" in (folder / "report.html").read_text()

    assert fd["facm", 1] <= 1.35 * fd["teacher", 50]
    assert fd["facm", 2] <= 1.35 * fd["teacher", 50]
    assert fd["teacher", 1] >= 10 * fd["facm", 1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_meets_its_bars(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "src" / "demo.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    check_demo(tmp_path / "outputs" / "demo")
