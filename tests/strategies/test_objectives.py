"""Every objective on two processes, under DDP and sharded: the gradients of one process with the joint batch.

The authors' MeanFlow and sCM losses never go through the data-parallel wrapper, so that ranks drift apart.
"""

from __future__ import annotations

import pytest
import torch

NAMES = ("facm", "meanflow", "scm", "imf", "imf_whole", "alpha_flow")
STEPS = 3
# Networks that are told the end in another way; under the strategy alone.
ENDS = ("decoupled", "gated")


@pytest.fixture(scope="module")
def one(training, folder):
    runs = {name: training.fit(folder, name, STEPS, 32, objective=name, validate=False) for name in NAMES}
    for end in ENDS:
        told = {"objective": "meanflow", "overrides": [f"objective/interval={end}"]}
        runs[end] = training.fit(folder, end, STEPS, 32, validate=False, **told)
    return runs


@pytest.fixture(scope="module")
def two(torchrun, one):
    common = {"steps": STEPS, "batch": 16, "validate": False}
    ways = {"ddp": {"ddp": True}, "sharded": {"sharded": {}}}
    told = {"objective": "meanflow", **common, "sharded": {}}
    return torchrun(
        2,
        *({"name": f"{name}_{way}", "objective": name, **common, **ways[way]} for name in NAMES for way in ways),
        *({"name": f"{end}_sharded", **told, "overrides": [f"objective/interval={end}"]} for end in ENDS),
    )


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, way) for way in ("ddp", "sharded") for name in NAMES), *((end, "sharded") for end in ENDS)],
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
