"""Networks sharded by stage against one process: losses, gradients, weights; and what is gathered, counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("sharded_steps.py")
DEPTH = 4

CASES = {
    "chain": {"engine": "Chain"},
    "separate": {"engine": "Chain", "separate": True},
    "selective": {"engine": "Chain", "options": {"recompute": "selective"}},
    "graph": {"engine": "Chain", "options": {"recompute": False}},
    "two_pass": {"engine": "TwoPass", "options": {"checkpoint": True}},
    "bf16": {"engine": "Chain", "bf16": True},
    "eager_gathers": {"engine": "Chain", "prefetch": False},
}


def launch(folder: Path, world: int, cases: dict) -> dict:
    """Run the program on `world` processes; what rank 0 found."""
    store, result = folder / f"store{world}", folder / f"result{world}.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(world), str(store), str(result), json.dumps(cases)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    one = launch(folder, 1, {"full": {"engine": "Full"}, "bf16": {"engine": "Chain", "bf16": True, "shard": True}})
    two = launch(folder, 2, CASES)
    four = launch(folder, 4, {"chain": CASES["chain"], "hybrid": {"engine": "Chain", "replicas": 2}})
    return one, two, four


def relative(found: dict, wanted: dict) -> float:
    assert found.keys() == wanted.keys()
    a, b = (torch.cat([torch.tensor(d[name], dtype=torch.float64) for name in wanted]) for d in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", [name for name in CASES if name != "bf16"])
def test_two_processes_equal_one(runs, case):
    one, two, _ = runs
    assert_same(two[case], one["full"])


@pytest.mark.parametrize("case", ["chain", "hybrid"])
def test_four_processes_equal_one(runs, case):
    one, _, four = runs
    assert_same(four[case], one["full"])


def assert_same(found: dict, wanted: dict) -> None:
    """The losses, the first gradient, and the weights after two steps of AdamW."""
    assert len(found["losses"]) == 2 and len(set(wanted["losses"])) == 2
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert relative(found["gradients"], wanted["gradients"]) <= 1e-5
    assert relative(found["parameters"], wanted["parameters"]) <= 1e-5


def test_bfloat16_parameters_follow_float32(runs):
    one, two, _ = runs
    assert two["bf16"]["losses"] == pytest.approx(one["full"]["losses"], rel=0.1)
    assert relative(two["bf16"]["gradients"], one["full"]["gradients"]) < 0.2
    assert relative(two["bf16"]["parameters"], one["full"]["parameters"]) < 0.01


@pytest.mark.parametrize("case", CASES)
def test_at_most_two_stages_are_whole(runs, case):
    """Over student and teacher together, at every operation of a step, forward and backward."""
    found = runs[1][case]
    largest = sorted(found["stages"])[-2:]
    assert 0 < found["peak"] <= sum(largest), (found["peak"], found["stages"])
    assert found["peak"] < 0.6 * sum(found["stages"])


def test_without_prefetch_one_stage_is_whole(runs):
    found = runs[1]["eager_gathers"]
    assert found["peak"] <= max(found["stages"])


def test_collectives_of_a_step(runs):
    """Each stage: gathered once by the teacher, once forward and once backward by the student; reduced once."""
    stages = DEPTH + 2
    joint, separate = runs[1]["chain"]["collectives"], runs[1]["separate"]["collectives"]
    gathers, reductions = (lambda c: c["_allgather_base_"]), (lambda c: c["_reduce_scatter_base_"])
    assert gathers(joint) == 3 * stages
    assert reductions(joint) == stages
    assert gathers(separate) > 4.5 * stages  # anchor and shortcut apart: each forward and backward
