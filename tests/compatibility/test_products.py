"""Matrix products of a forward and backward by each engine, in forwards of the network: what docs/chain_jvp.md says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flowanchor.interfaces import Question
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.plugins.backbones.lightningdit import LightningDiT

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


class Products(TorchDispatchMode):
    """Operations in matrix products, fused attention left out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    "engine, forwards",
    [
        (Chain(True), 5), (Chain("selective"), 4), (Chain(False), 4), (TwoPass(checkpoint=True), 6), (TwoPass(), 5),
        (Full(), 5), (FiniteDifference(checkpoint=True), 6), (FiniteDifference(), 5),
    ],
    ids=str,
)  # fmt: skip
def test_products_of_a_step(engine, forwards):
    torch.manual_seed(0)
    network = LightningDiT(8, 2, 3, hidden_size=64, depth=6, num_heads=4, num_classes=10)  # 16 tokens
    x, v = torch.randn(2, 4, 3, 8, 8)
    t, labels = torch.rand(4), torch.arange(4)
    with torch.no_grad(), Products() as once:
        network.predict(x, t, labels)
    with Products() as step:
        (answer,) = engine(network, x, labels, [Question(t, along=(v, torch.ones(4)))])
        answer.prediction.sum().backward()
    assert step.total / once.total == pytest.approx(forwards, abs=0.25)
