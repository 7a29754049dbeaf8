"""`torchrun(processes, *specs)`: runs of training.py, by gloo processes; `training`: that file, imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("training.py")
DIED = re.compile(r"exitcode\s*: -(6|11)\b")  # SIGABRT, SIGSEGV: no test of ours ends like that


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def torchrun(folder: Path) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Runs specs in so many processes; returns for each spec's name what every rank found."""

    def run(processes: int, *specs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, str(SCRIPT), str(folder), json.dumps(specs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for attempt in range(2):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
            if done.returncode == 0 or attempt or not DIED.search(done.stderr):
                break
            # Seen once in some hundred runs, never twice: a process aborts within gloo ("malloc(): unaligned ...").
            warnings.warn(f"A process was ended by a signal; trying once more.\n{done.stderr}", stacklevel=1)
        assert done.returncode == 0, done.stdout + done.stderr
        return {
            spec["name"]: [
                torch.load(folder / f"{spec['name']}_{rank}.pt", weights_only=False) for rank in range(processes)
            ]
            for spec in specs
        }

    return run
