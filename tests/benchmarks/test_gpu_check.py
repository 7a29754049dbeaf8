"""The check for GPUs, as far as a machine without one can try it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks" / "gpu_check.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=240)


def test_a_trial_on_the_cpu_claims_no_gpu(tmp_path):
    readme = (ROOT / "README.md").read_text()
    done = run("--device", "cpu", "--tiny", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert "no GPU" in record["machine"]["device"]
    assert not list(tmp_path.glob("gpu_*")), "only records of a GPU carry that name"
    assert "LightningDiT-XL/1" not in done.stdout
    assert (ROOT / "README.md").read_text() == readme


def test_a_trial_needs_a_folder_of_its_own():
    assert "--results" in run("--device", "cpu", "--tiny").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence():
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("This machine has no CUDA device")


def test_without_a_record_nothing_is_claimed():
    text = gpu_check.table(None)
    assert text.count("not measured") == 2 * len(gpu_check.ENGINES) + 4 * len(gpu_check.LENGTHS)


def test_only_light_imports():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu_check; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not {"hydra", "omegaconf", "webdataset", "torch_fidelity", "torchmetrics"} & set(done.stdout.split())
