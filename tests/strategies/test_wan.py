"""Wan on two processes: sharded and under DDP one process' results; its modulation stays float32 under bfloat16."""

from __future__ import annotations

import pytest
import torch

STEPS = 3
TABLES = {f"blocks.{index}.scale_shift_table" for index in range(2)}
COMMON = {"steps": STEPS, "objective": "facm", "wan": "one", "validate": False, "lr": 0.02}
ROUTED = [
    "objective/time=routed",
    "objective.time.time.shift=1.0",
    "objective.time.boundary=0.5",
    "objective.shortcut.boundaries=[0.5]",
]
LORA = {**COMMON, "lora": {"rank": 2}}
BASE = {**LORA, "teacher": "base"}
QUANTISED = {**BASE, "base": "int8"}
EXPERTS = {**COMMON, "wan": "experts", "steps": 4, "overrides": ROUTED}
COMPILED = {**EXPERTS, "layers": 1}


@pytest.fixture(scope="module")
def one(training, folder):
    return {
        "exact": training.fit(folder, "one", **COMMON, batch=32, save=True),
        "lora": training.fit(folder, "lora", **LORA, start=str(folder / "one.ckpt"), batch=32),
        "base": training.fit(folder, "base", **BASE, start=str(folder / "one.ckpt"), batch=32),
        "quantised": training.fit(folder, "quantised", **QUANTISED, start=str(folder / "one.ckpt"), batch=32),
        "experts": training.fit(folder, "experts", **EXPERTS, batch=32),
        "compiled": training.fit(folder, "compiled", **COMPILED, batch=32),
        "low": training.fit(folder, "low", **COMMON, batch=32, precision="bf16-mixed"),
    }


@pytest.fixture(scope="module")
def two(torchrun, one, folder):
    rest = {**COMMON, "batch": 16}
    return torchrun(
        2,
        {"name": "sharded", **rest, "sharded": {}},
        {"name": "ddp", **rest, "ddp": True},
        {"name": "experts", **EXPERTS, "batch": 16, "sharded": {}},
        {"name": "compiled", **COMPILED, "batch": 16, "sharded": {}, "compiled": True},
        {"name": "lora", **LORA, "start": str(folder / "one.ckpt"), "batch": 16, "sharded": {}},
        {"name": "base", **BASE, "start": str(folder / "one.ckpt"), "batch": 16, "sharded": {}},
        {"name": "quantised", **QUANTISED, "start": str(folder / "one.ckpt"), "batch": 16, "ddp": True},
        {"name": "low", **rest, "sharded": {}, "precision": "bf16-mixed", "save": True},
        {"name": "taught", **rest, "sharded": {}, "teacher": str(folder / "one.ckpt")},
    )


@pytest.mark.parametrize(
    "way, alone",
    [
        ("sharded", "exact"),
        ("ddp", "exact"),
        ("experts", "experts"),
        ("compiled", "compiled"),
        ("lora", "lora"),
        ("base", "base"),
        ("quantised", "quantised"),
    ],
)
def test_two_processes_equal_one(one, two, way, alone):
    theirs = one[alone]
    assert all(norm > 0 for norm in theirs["norms"])
    joint = torch.tensor([rank["losses"] for rank in two[way]]).mean(0)
    torch.testing.assert_close(joint, torch.tensor(theirs["losses"]), rtol=1e-5, atol=1e-6)
    for rank in two[way]:
        for name, value in theirs["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_tables_of_the_modulation_stay_float32(one, two):
    """Not sharded under bfloat16, trained all the same, equal on both processes and close to one process' tables."""
    assert not two["sharded"][0]["plain"]
    first, second = two["low"]
    assert set(first["plain"]) == TABLES
    for name in sorted(TABLES):
        key = f"student.{name}"
        assert torch.equal(first["weights"][key], second["weights"][key]), name
        alone, trained = one["low"]["weights"][key], one["exact"]["weights"][key]
        assert (first["weights"][key] - alone).norm() <= 0.02 * alone.norm() and trained.dtype == alone.dtype, name
    torch.testing.assert_close(
        torch.tensor([rank["losses"] for rank in two["low"]]).mean(0), torch.tensor(one["low"]["losses"]), rtol=0.03,
        atol=0.01,
    )  # fmt: skip


def test_both_experts_are_trained(training, one):
    start = training.network(wan="experts").state_dict()
    for name in ("high.blocks.1.attn1.to_q.weight", "low.blocks.1.attn1.to_q.weight", "low.scale_shift_table"):
        assert (one["experts"]["weights"][f"student.{name}"] - start[name]).abs().max() > 1e-4, name


def test_a_frozen_teacher_is_sharded_beside_it(two):
    assert two["taught"][0]["sharded_teacher"] >= 40
    assert all(torch.isfinite(torch.tensor(rank["losses"])).all() for rank in two["taught"])
