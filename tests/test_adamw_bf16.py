"""AdamW with moments in bfloat16 against AdamW, and its rounding against its mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flowanchor.errors import ConfigError
from flowanchor.optimizer_settings import with_own_settings
from flowanchor.optimizers import AdamWBF16
from flowanchor.optimizers.adamw_bf16 import rounded_at_random
from flowanchor.strategies.chain_jvp import _restore_optimizer


def trained(make: Any, steps: int, **settings: Any) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A regression with noise: where its weights come to."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    right = torch.randn(32, 64)
    optimizer = make(layer.parameters(), lr=3e-3, weight_decay=0.01, **settings)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 64, generator=draw)
        optimizer.zero_grad()
        (layer(x) - x @ right.T).square().mean().backward()
        optimizer.step()
    return layer.weight.detach(), optimizer


def test_it_follows_adamw():
    exact, _ = trained(torch.optim.AdamW, 300)
    low, optimizer = trained(AdamWBF16, 300)
    start, _ = trained(torch.optim.AdamW, 0)
    assert (low - exact).norm() < 0.01 * (exact - start).norm()
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_one_step_is_adamw_to_rounding():
    for steps in (1, 2):
        exact, _ = trained(torch.optim.AdamW, steps)
        low, _ = trained(AdamWBF16, steps)
        torch.testing.assert_close(low, exact, rtol=0, atol=steps * 3e-3 * 2**-7)


def test_the_second_moment_falls_again():
    """Rounded to the nearest it would stay: a step of beta2 = 0.999 is less than bfloat16 can tell apart."""
    p = nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBF16([p], lr=0.0)
    for size, steps in ((1.0, 1000), (0.0, 500)):
        p.grad = torch.full_like(p, size)
        for _ in range(steps):
            optimizer.step()
    second = optimizer.state[p]["exp_avg_sq"].float()
    wanted = (1 - 0.999**1000) * 0.999**500
    assert second.mean() == pytest.approx(wanted, rel=0.01)
    stuck = torch.tensor(1.0).bfloat16()
    assert stuck * 0.999 == stuck, "what it would be without"


def test_rounding_is_right_on_average_and_to_a_neighbour():
    exact = torch.tensor([1.0 + 0.3 * 2**-7, -3e-20, 0.0, 2.5]).repeat(20000, 1)
    found = rounded_at_random(exact, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(found.mean(0), exact[0], rtol=2e-4, atol=0)
    assert set(found[:, 0].tolist()) == {1.0, 1.0 + 2**-7}
    assert torch.equal(found[:, 2:], exact[:, 2:]), "what bfloat16 can hold stays"
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    kept = rounded_at_random(special)
    assert torch.equal(kept[:2].float(), special[:2]) and kept[2].isnan()


def test_it_leaves_the_training_draws_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    p = nn.Parameter(torch.ones(100))
    p.grad = torch.ones(100)
    AdamWBF16([p]).step()
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("load", [torch.optim.Optimizer.load_state_dict, _restore_optimizer])
def test_a_resume_goes_on_bit_for_bit(load):
    def go_on(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            for p in weights:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    def made(values: list[torch.Tensor]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        weights = [nn.Parameter(value.clone()) for value in values]
        groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.1}]
        return weights, with_own_settings(AdamWBF16(groups, lr=1e-2))

    torch.manual_seed(0)
    start = [torch.randn(40, 3), torch.randn(7)]
    whole, optimizer = made(start)
    go_on(whole, optimizer, 0, 8)
    half, optimizer = made(start)
    go_on(half, optimizer, 0, 4)
    again, fresh = made([p.detach() for p in half])
    load(fresh, optimizer.state_dict())
    assert all(fresh.state[p]["exp_avg_sq"].dtype == torch.bfloat16 for p in again)
    go_on(again, fresh, 4, 8)
    for p, q in zip(again, whole, strict=True):
        assert torch.equal(p, q)


def test_parameters_without_gradient_stay_as_they_are():
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    used.grad = torch.ones(3)
    optimizer = AdamWBF16([used, idle], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(idle, torch.ones(3)) and not optimizer.state[idle]


@pytest.mark.parametrize(("setting", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", -1e-8)])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ConfigError, match=rf"optimizer.{setting} is out of range"):
        AdamWBF16([nn.Parameter(torch.ones(1))], **{setting: value})
