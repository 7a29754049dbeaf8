"""Engines that need no stages take any module that is called with `(x, t, cond)`, and with `r` where it is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowanchor.errors import ConfigError
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.jvp.compatibility import check

from .networks import ask_one

ENGINES = [Full(), Full(attention="streaming"), FiniteDifference(dtype="float64")]


class Net(nn.Module):
    """F(x, t) of images [B, 3, 4, 4] and labels, and nothing that a Backbone has besides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.outward = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time, self.label = nn.Linear(1, 8), nn.Embedding(10, 8)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.outward(torch.tanh(self.inward(x) + (self.time(t[:, None]) + self.label(cond))[..., None, None]))


class TwoTimes(Net):
    """With a required second time, a method of the name `predict`, and a list `blocks`, all its own."""

    blocks = ()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, r: Tensor) -> Tensor:
        return super().forward(x, t * r.square(), cond)

    def predict(self) -> None:
        raise AssertionError


def given(kind: type[Net], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, 4, 3, 4, 4, dtype=dtype, generator=draw)
    t = torch.rand(4, dtype=dtype, generator=draw)
    more = {"r": 0.9 + 0 * t, "tangent_r": torch.ones_like(t)} if kind is TwoTimes else {}
    return {"x": x, "t": t, "cond": torch.arange(4), "tangent_x": dx, "tangent_t": torch.ones_like(t), **more}


@pytest.mark.parametrize("held", [False, True], ids=["r moves", "r is held"])
@pytest.mark.parametrize("kind", [Net, TwoTimes])
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_tangent_equals_central_differences(engine, kind, held):
    network, inputs, ways = kind().double(), given(kind), []
    if held:
        inputs.pop("tangent_r", None)
    for step in (1e-5, -1e-5):
        moved = [inputs[k] + step * inputs.get(f"tangent_{k}", 0) for k in ("x", "t", "r") if k in inputs]
        ways.append(network(*moved[:2], inputs["cond"], *moved[2:]).detach())
    dual, wanted = ask_one(engine, network, **inputs), (ways[0] - ways[1]) / 2e-5
    assert (dual.tangent - wanted).norm() < 1e-7 * wanted.norm() and not dual.tangent.requires_grad
    dual.prediction.square().sum().backward()
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    more = () if "r" not in inputs else (inputs["r"],)
    network(inputs["x"], inputs["t"], inputs["cond"], *more).square().sum().backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-10) for a, p in zip(found, network.parameters(), strict=True))


def test_differences_in_float64_of_a_float32_module():
    network, inputs = Net(), given(Net, torch.float32)
    exact = ask_one(Full(), network, **inputs).tangent
    found = ask_one(FiniteDifference(dtype="float64"), network, **inputs).tangent
    assert (found - exact).norm() < 2e-6 * exact.norm() and found.dtype == torch.float32


def test_dropout_is_the_same_both_ways():
    network = nn.Sequential(Net(), nn.Dropout(0.5)).double().train()
    network.forward = lambda x, t, cond: network[1](network[0](x, t, cond))
    found = []
    for engine in (Full(), FiniteDifference(dtype="float64")):
        torch.manual_seed(0)
        found.append(ask_one(engine, network, **given(Net)))
    assert all((a - b).norm() < 1e-7 * a.norm() for a, b in zip(*found, strict=True))


def test_before_training_too():
    for engine in ENGINES:
        check(engine, Net(), sharded=False, low_precision=False)
    with pytest.raises(ConfigError, match="drowns in the roundoff"):
        check(FiniteDifference(), Net(), sharded=False, low_precision=True)
    for engine in (Chain(), TwoPass()):
        with pytest.raises(ConfigError, match=r"^Net is no chain of stages.* use jvp=full .*, which takes any module"):
            check(engine, Net(), sharded=False, low_precision=False)


def test_what_a_plain_module_cannot_have():
    with pytest.raises(ConfigError, match="jvp.checkpoint=true checkpoints the blocks of a Backbone, and Net is none"):
        ask_one(FiniteDifference(dtype="float64", checkpoint=True), Net().double(), **given(Net))
    with pytest.raises(ConfigError, match="jvp.checkpoint=true checkpoints the blocks of a Backbone, and Net is none"):
        check(FiniteDifference(checkpoint=True), Net(), sharded=False, low_precision=False)
    network = Net().double()
    network.forward = lambda x, t, cond: (x, t)
    for engine in ENGINES:
        with pytest.raises(ConfigError, match="^Net returned a value of type tuple: return the velocity alone"):
            ask_one(engine, network, **given(Net))
