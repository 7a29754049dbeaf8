"""What adapters stand beside, in fewer bits: the same answers where autocast rounds anyway, else of those numbers."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from flowanchor.checkpoints.frozen_base import keep_base
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Batch, Question, Times
from flowanchor.jvp import Chain, Full
from flowanchor.jvp.live_bytes import LiveBytes
from flowanchor.jvp.memory_plan import InTheClear, StepOfShapes
from flowanchor.plugins.backbones.lora import is_adapter
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.text.base import Tokens
from flowanchor.weights import all_finite

from ..graphs.runs import objective

SMALL: dict[str, Any] = {
    "in_channels": 1, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12, "text_len": 6,
}  # fmt: skip


def adapted(num_layers: int = 2) -> Wan:
    torch.manual_seed(0)
    network = Wan(**{**SMALL, "num_layers": num_layers}, lora={"rank": 3, "alpha": 6})
    with torch.no_grad():
        nn.init.normal_(network.proj_out.weight, std=0.2)
        for name, parameter in network.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.3)
    return network.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, Tokens, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 1, 1, 8, 8)
    return x, torch.tensor([0.2, 0.7]), Tokens(torch.randn(2, 4, 12)), torch.randn_like(x), torch.ones(2)


def layers(network: Wan) -> dict[str, nn.Linear]:
    found = network.named_modules()
    return {name: one for name, one in found if isinstance(one, nn.Linear) and name.startswith("blocks.")}


def answers(network: Wan, engine: Any) -> list[torch.Tensor]:
    """Value, tangent, and the gradients of the adapters, one behind the other."""
    x, t, text, along, moves = inputs()
    network.zero_grad()
    answer = engine(network, x, text, [Question(t, along=(along, moves))])[0]
    answer.prediction.square().sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(gradients) == len(trained)
    return [answer.prediction.detach(), answer.tangent.detach(), torch.cat(gradients)]


def test_bfloat16_is_what_autocast_makes_of_them():
    """The same bits, half the memory; adapters, norms and what the network keeps in float32 stay as they are."""
    plain = adapted()
    low = deepcopy(plain)
    keep_base(low, "bfloat16", low_precision=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for ours, theirs in zip(answers(low, Chain()), answers(plain, Chain()), strict=True):
            assert torch.equal(ours, theirs)
    kept = {inner for module in low.float32_modules() for inner in module.modules()}
    for name, layer in low.named_modules():
        if isinstance(layer, nn.Linear):
            wanted = torch.float32 if is_adapter(f"{name}.") or layer in kept else torch.bfloat16
            assert layer.weight.dtype == wanted, name
    assert low.state_dict().keys() == plain.state_dict().keys() and low.borrowed() == plain.borrowed()


def test_what_cannot_be():
    whole = Wan(**SMALL)
    for network, given, message in (
        (adapted(), ("int3", True), "base_dtype=int3 is unknown: choose float32, bfloat16, int8, float8"),
        (adapted(), ("bnb8", True), "bitsandbytes' 8 bits have no forward-mode derivative"),
        (whole, ("int8", True), "this network trains all of its own: leave it out, or train adapters"),
        (adapted(), ("bfloat16", False), "needs a run that casts to it: set trainer.precision=bf16-mixed"),
        (adapted(), ("bfloat16", True, True), "is not for a sharded network"),
    ):
        with pytest.raises(ConfigError, match=message):
            keep_base(network, *given)
    keep_base(whole, "float32", False, True)


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match="base_dtype=int8 needs torchao: pip install 'flowanchor.quantise.'"):
        keep_base(adapted(), "int8", False)


@pytest.mark.parametrize("engine", [Chain(), Chain("selective"), Chain(False), Full()], ids=repr)
@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_quantised_weights_answer_as_the_numbers_they_stand_for(dtype, engine):
    """Value, tangent, gradients of the adapters: those of the same network with the rounded weights in the clear."""
    given = adapted()
    low, plain = deepcopy(given), deepcopy(given)
    keep_base(low, dtype, low_precision=False)
    changed = 0
    for name, layer in low.named_modules():
        if isinstance(layer, nn.Linear) and type(layer.weight.data) is not torch.Tensor:
            number = layer.weight.dequantize()
            step = 0.5 / 127 if dtype == "int8" else 2**-4  # of a row's largest number; of each number itself
            before = plain.get_submodule(name).weight
            large = before.abs().amax(1, keepdim=True) if dtype == "int8" else before.abs() + 1e-3
            assert ((number - before).abs() <= 1.01 * step * large).all() and not torch.equal(number, before)
            plain.get_submodule(name).weight = nn.Parameter(number.float(), requires_grad=False)
            changed += 1
    assert changed == 10 * SMALL["num_layers"], "self-attention, cross-attention, feed-forward, nothing else"
    for ours, theirs in zip(answers(low, engine), answers(plain, Full()), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_quantised_base_is_planned_and_moves():
    """A plan looks at no quantised weight, which could not move to a device any more; the other numbers stay."""
    plain, goal = adapted(1), objective("objective=facm")
    low = deepcopy(plain)
    keep_base(low, "int8", low_precision=False)
    x, t, text, *_ = inputs()
    batch, engine, peaks = Batch(x, text), Chain(True), []
    for network in (plain, low):
        step = StepOfShapes(network, goal, DataVelocity())
        peaks.append(step.peak(engine, batch, torch.randn_like(x), Times(t), t, 0))
        network.to("cpu")
    block = sum(layer.weight.numel() for layer in layers(plain).values()) * 4
    assert 0 <= peaks[1] - peaks[0] <= 1.5 * block
    assert all_finite(low.parameters()) and not all_finite([*low.parameters(), torch.tensor([float("nan")])])
    before = answers(low, Chain())
    low.cpu()
    assert all(torch.equal(a, b) for a, b in zip(answers(low, Chain()), before, strict=True))


@pytest.mark.parametrize("casts", [False, True])
def test_a_plan_takes_for_a_product_what_torchao_takes(casts):
    """While it runs, and kept until the backward pass: the weight as plain numbers."""
    plain = nn.Linear(256, 320).requires_grad_(False)
    low = deepcopy(plain)
    quantize_(low, Int8WeightOnlyConfig(set_inductor_config=False))
    found = []
    for layer, quantised in ((low, set()), (plain, {id(plain.weight)})):
        x = torch.randn(4, 256, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=casts), LiveBytes() as counter, InTheClear(quantised):
            y = layer(x)
            kept = counter.live
            y.sum().backward()
        found.append((kept, counter.peak))
    assert found[1] == pytest.approx(found[0], rel=0.03)
    assert found[0][0] > 256 * 320 * (2 if casts else 4)


def test_bytes_of_a_quantised_base():
    """One byte per value of the blocks' layers, and a scale per row."""
    low = adapted()
    linear = sum(
        one.weight.numel()
        for name, one in low.named_modules()
        if isinstance(one, nn.Linear) and name.startswith("blocks.") and name.endswith("base_layer")
    )
    before = held(low)
    keep_base(low, "int8", low_precision=False)
    assert before - held(low) > 2.7 * linear


def held(network: nn.Module) -> int:
    """Bytes of the parameters, of quantised ones those of their parts."""
    found = 0
    for parameter in network.parameters():
        parts = [parameter.data]
        if type(parameter.data) is not torch.Tensor:
            parts = [getattr(parameter.data, name) for name in parameter.data.__tensor_flatten__()[0]]
        found += sum(part.numel() * part.element_size() for part in parts)
    return found
