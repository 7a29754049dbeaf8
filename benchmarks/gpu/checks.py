"""The tests that need a GPU, as a row of their own: they stop nothing, and the table says how they ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

from gpu.record import Row
from harness import ROOT

LIMIT = {"cuda": 90, "cpu": 900}  # seconds
GRAPHS = "tests/graphs/test_cuda.py"
# Of a trial: one of each kind that takes a second or two.
SOME = (
    "formula or masks or no_value or ((every_engine or autocast) and chain)"
    " or (sharded_step and float32 and not selective and not TwoPass)"
)


def run(device: str, tiny: bool) -> dict[str, Any]:
    """`pytest tests/gpu`, by itself: no other test's fixtures, no other package than PyTorch's."""
    return _tested(device, ["tests/gpu", *(["-k", SOME] if tiny else [])])


def run_graphs(device: str) -> dict[str, Any]:
    """Trainings of several networks as graphs, beside the same without; on a CPU, which has none, they are found."""
    lacking = [name for name in ("hydra", "diffusers") if find_spec(name) is None]
    if lacking:
        return {"missing": f"not installed: {', '.join(lacking)}"}
    return _tested(device, [GRAPHS, *(["--collect-only"] if device == "cpu" else [])])


def _tested(device: str, chosen: list[str]) -> dict[str, Any]:
    if find_spec("pytest") is None:
        return {"missing": "pytest is not installed"}
    options = ["-q", "-rfE", "--noconftest", "-p", "no:cacheprovider", "-m", "gpu", *chosen]
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "FLOWANCHOR_TESTS_ON": device}
    command = [sys.executable, "-m", "pytest", *options]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT[device],
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {"missing": f"not done after {LIMIT[device]} s"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip()[-300:].splitlines() or ["no word"]
    verdict = re.sub(r" in [\d.]+s.*", "", lines[-1]).strip("= ")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "verdict": verdict, "failed": failed[:40], "said": done.stdout[-4000:]}


def rows(device: str, tiny: bool) -> list[Row]:
    return [
        Row("tests", partial(run, device, tiny), LIMIT[device] + 10, 20),
        Row("graphs, tests", partial(run_graphs, device), LIMIT[device] + 10, 30),
    ]
