"""Tangents against central differences in float64, and the engine's contract."""

from __future__ import annotations

import pytest
import torch

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Question
from flowanchor.jvp import Full
from flowanchor.plugins.backbones.lightningdit import LightningDiT

SWITCHES = [
    {},
    {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True},
    {"use_qknorm": True, "wo_shift": True, "patch_size": 1},
    {"use_swiglu": True, "use_rmsnorm": True, "learn_sigma": True, "auxiliary_time_cond": True},
]


def random_network(**switches):
    torch.manual_seed(0)
    settings = {
        "input_size": 4,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    network = LightningDiT(**{**settings, **switches}).double().eval()
    for parameter in network.parameters():  # a fresh network has zero gates and a zero head: nothing would be tested
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def inputs(network):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *network.sample_shape, dtype=torch.float64, generator=generator)
    dx = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return x, t, torch.tensor([0, 3, 5]), dx, torch.tensor([1.0, 0.3, -2.0], dtype=torch.float64)


def ask(network, x, cond, question):
    return Full()(network, x, cond, [question])[0]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_tangent_equals_central_differences(switches):
    network = random_network(**switches)
    x, t, y, dx, dt = inputs(network)
    r = torch.full_like(t, 1.0) if network.takes_end_time else None
    dual = ask(network, x, y, Question(t, r, (dx, dt)))
    with torch.no_grad():
        assert torch.equal(dual.prediction, network(x, t, y, r)) or torch.allclose(
            dual.prediction, network(x, t, y, r), atol=1e-12
        )
        h = 1e-5
        difference = (network(x + h * dx, t + h * dt, y, r) - network(x - h * dx, t - h * dt, y, r)) / (2 * h)
    assert (dual.tangent - difference).norm() / difference.norm() < 1e-7


def test_tangent_of_the_second_time():
    network = random_network(auxiliary_time_cond=True)
    x, t, y, dx, dt = inputs(network)
    r, dr = t + 0.05, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    dual = ask(network, x, y, Question(t, r, (dx, dt, dr)))
    h = 1e-5
    with torch.no_grad():
        difference = (
            network(x + h * dx, t + h * dt, y, r + h * dr) - network(x - h * dx, t - h * dt, y, r - h * dr)
        ) / (2 * h)
    assert (dual.tangent - difference).norm() / difference.norm() < 1e-7
    held = ask(network, x, y, Question(t, r, (dx, dt))).tangent
    assert not torch.allclose(held, dual.tangent)


def test_prediction_carries_gradient_and_tangent_does_not():
    network = random_network()
    x, t, y, dx, dt = inputs(network)
    dual = ask(network, x, y, Question(t, along=(dx, dt)))
    assert dual.prediction.requires_grad and not dual.tangent.requires_grad
    network.zero_grad()
    dual.prediction.square().sum().backward()
    ours = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    network(x, t, y).square().sum().backward()
    theirs = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_wrong_tangents_are_refused_in_one_sentence():
    network = random_network()
    x, t, y, dx, dt = inputs(network)
    with pytest.raises(ConfigError, match="they must match"):
        ask(network, x, y, Question(t, along=(dx[:, :1], dt)))
    with pytest.raises(ConfigError, match="without r"):
        ask(network, x, y, Question(t, None, (dx, dt, dt)))
