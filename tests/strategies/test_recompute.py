"""`jvp.recompute=auto` with two processes, each with memory of its own."""

from __future__ import annotations

import pytest
import torch

COMMON = {"batch": 16, "objective": "facm", "steps": 1, "validate": False}
SMALL, LARGE = 0, 10**12


@pytest.fixture(scope="module")
def two(torchrun):
    auto = {**COMMON, "recompute": "auto"}
    return torchrun(
        2,
        {"name": "sharded", **auto, "sharded": {}, "rooms": [LARGE, SMALL]},
        {"name": "ddp", **auto, "ddp": True, "rooms": [LARGE, LARGE]},
        {"name": "fixed", **COMMON, "ddp": True, "recompute": False},
    )


def test_what_fits_all_of_them(two):
    assert [found["form"] for found in two["sharded"]] == [True, True]
    assert [found["form"] for found in two["ddp"]] == [False, False]


def test_a_trial_leaves_nothing(two):
    """Not in the hooks of DistributedDataParallel either."""
    for found, wanted in zip(two["ddp"], two["fixed"], strict=True):
        assert found["losses"] == wanted["losses"]
        for name, value in wanted["weights"].items():
            assert torch.equal(value, found["weights"][name]), name
