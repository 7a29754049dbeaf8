"""Every objective on two processes, under DDP and sharded: the gradients of one process with the joint batch.

The authors' MeanFlow and sCM losses never go through the data-parallel wrapper, so that ranks drift apart.
"""

from __future__ import annotations

import pytest
import torch

NAMES = ("facm", "meanflow", "scm", "imf", "imf_whole", "alpha_flow")
STEPS = 3
# Networks that are told the end in another way, or predict the data; under the strategy alone.
OTHERS = {
    "decoupled": {"objective": "meanflow", "overrides": ["objective/interval=decoupled"]},
    "gated": {"objective": "meanflow", "overrides": ["objective/interval=gated"]},
    "of_data": {"objective": "facm", "predicts": "x"},
}


@pytest.fixture(scope="module")
def one(training, folder):
    runs = {name: training.fit(folder, name, STEPS, 32, objective=name, validate=False) for name in NAMES}
    return runs | {name: training.fit(folder, name, STEPS, 32, validate=False, **told) for name, told in OTHERS.items()}


@pytest.fixture(scope="module")
def two(torchrun, one):
    common = {"steps": STEPS, "batch": 16, "validate": False}
    ways = {"ddp": {"ddp": True}, "sharded": {"sharded": {}}}
    return torchrun(
        2,
        *({"name": f"{name}_{way}", "objective": name, **common, **ways[way]} for name in NAMES for way in ways),
        *({"name": f"{name}_sharded", **told, **common, "sharded": {}} for name, told in OTHERS.items()),
    )


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, way) for way in ("ddp", "sharded") for name in NAMES), *((name, "sharded") for name in OTHERS)],
)
def test_two_processes_equal_one(one, two, name, way):
    theirs, ours = one[name], two[f"{name}_{way}"]
    assert all(norm > 0 for norm in theirs["norms"])
    joint = torch.tensor([rank["losses"] for rank in ours]).mean(0)
    torch.testing.assert_close(joint, torch.tensor(theirs["losses"]), rtol=1e-5, atol=1e-6)
    for rank in ours:
        torch.testing.assert_close(torch.tensor(rank["norms"]), torch.tensor(theirs["norms"]), rtol=1e-4, atol=0)
        assert rank["weights"].keys() == theirs["weights"].keys()
        for key, value in theirs["weights"].items():
            torch.testing.assert_close(rank["weights"][key], value, rtol=1e-5, atol=1e-5, msg=key)
            assert torch.equal(rank["weights"][key], ours[0]["weights"][key]), key


def test_the_learned_weight_is_trained_on_both(one, two):
    key = "objective.shortcut.weight.linear.weight"
    for run in (one["scm"], *two["scm_ddp"], *two["scm_sharded"]):
        assert run["weights"][key].abs().sum() > 0
