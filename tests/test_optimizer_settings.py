"""A resumed optimizer has the checkpoint's moments and its own settings."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.optimizer_settings import fused_on_cuda, with_own_settings
from flowanchor.strategies.chain_jvp import _restore_optimizer


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))]


def trained(make, steps=3):
    weights = parameters()
    optimizer = make([{"params": weights[:1]}, {"params": weights[1:]}])
    for step in range(steps):
        for weight in weights:
            weight.grad = torch.full_like(weight, step + 1.0)
        optimizer.step()
    return optimizer


def adamw(groups, **settings):
    return with_own_settings(torch.optim.AdamW(groups, **{"lr": 1e-3, **settings}))


@pytest.mark.parametrize("load", [torch.optim.Optimizer.load_state_dict, _restore_optimizer])
def test_every_setting_of_every_group_is_the_new_one(load):
    state = trained(adamw).state_dict()
    new = {"lr": 1e-5, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.5, "amsgrad": False, "maximize": True}
    weights = parameters()
    optimizer = adamw([{"params": weights[:1]}, {"params": weights[1:]}], **new)
    load(optimizer, state)
    for group in optimizer.param_groups:
        assert {key: group[key] for key in new} == new
    assert optimizer.state[weights[0]]["step"] == 3
    assert torch.equal(optimizer.state[weights[1]]["exp_avg"], state["state"][1]["exp_avg"])


def test_what_did_not_change_comes_from_the_checkpoint():
    state = trained(adamw).state_dict()
    state["param_groups"][1]["lr"] = 2e-4  # by a callback that lowers the rate of a group when the loss stalls
    weights = parameters()
    made = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:]}], lr=1e-3, weight_decay=0.5)
    optimizer = with_own_settings(made, kept={"lr"})
    optimizer.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_what_an_optimizer_counts_in_its_groups_goes_on():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["taken"] = group.get("taken", 0) + 1

    state = trained(lambda groups: with_own_settings(Counting(groups, lr=0.1))).state_dict()
    optimizer = with_own_settings(Counting([{"params": [p]} for p in parameters()], lr=0.2))
    optimizer.load_state_dict(state)
    assert [(group["lr"], group["taken"]) for group in optimizer.param_groups] == [(0.2, 3)] * 2


def scheduled(lr, state=None):
    weights = parameters()
    optimizer = adamw([{"params": weights[:1]}, {"params": weights[1:]}], lr=lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    if state is not None:
        optimizer.load_state_dict(state)
    return optimizer, scheduler


def test_a_scheduler_goes_on_from_its_rate_or_refuses_another():
    optimizer, scheduler = scheduled(1e-3)
    optimizer.step()
    scheduler.step()
    state = optimizer.state_dict()
    assert scheduled(1e-3, state)[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    with pytest.raises(CheckpointError, match="optimizer.lr=0.01 cannot take the place of 0.001 on a resume"):
        scheduled(1e-2, state)


def test_other_groups_are_one_sentence():
    with pytest.raises(CheckpointError, match=r"groups of \[1, 1\] parameters and this one of \[2\]: resume with"):
        adamw(parameters()).load_state_dict(trained(adamw).state_dict())


def test_fused_is_decided_by_the_device():
    make = partial(torch.optim.AdamW, fused=None)
    assert fused_on_cuda(make, torch.device("cuda"), scaled=False).keywords["fused"] is True
    assert fused_on_cuda(make, torch.device("cpu"), scaled=False).keywords["fused"] is False
    assert fused_on_cuda(make, torch.device("cuda"), scaled=True).keywords["fused"] is False
    for chosen in (True, False):
        kept = partial(torch.optim.AdamW, fused=chosen)
        assert fused_on_cuda(kept, torch.device("cuda"), scaled=False) is kept
    assert fused_on_cuda(torch.optim.SGD, torch.device("cuda"), scaled=True) is torch.optim.SGD
    with pytest.raises(ConfigError, match="optimizer.fused=true divides the gradients"):
        fused_on_cuda(partial(torch.optim.AdamW, fused=True), torch.device("cuda"), scaled=True)


def test_a_fused_optimizer_goes_on_from_one_that_was_not():
    first = trained(torch.optim.AdamW)
    again = with_own_settings(torch.optim.AdamW([{"params": [p]} for p in parameters()], fused=True))
    again.load_state_dict(first.state_dict())
    assert all(group["fused"] for group in again.param_groups)
    for weight in (p for group in again.param_groups for p in group["params"]):
        assert again.state[weight]["step"] == 3
        weight.grad = torch.ones_like(weight)
    again.step()
