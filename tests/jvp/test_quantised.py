"""A frozen weight that is stored quantised, as a tensor's subclass that knows linear layers and no other product."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.jvp import Chain, Full

from .networks import RELEASED, ask_one, inputs, lightningdit


class Eight(Tensor):
    """Eight bits per number, and a scale: what torchao's weights are."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.linear:
            x, weight, *bias = args
            return functional.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten._to_copy.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised weight")


def quantised(layer: nn.Linear) -> None:
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    codes = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Eight(codes, scale), requires_grad=False)


@pytest.mark.parametrize("engine", [Chain(), Chain("selective"), Chain(False)], ids=repr)
def test_gradients_go_through_quantised_weights(engine):
    """To the layers before them, as through the same numbers in the clear."""
    network = lightningdit(**RELEASED).double()
    plain = deepcopy(network)
    for block, clear in zip(network.blocks, plain.blocks, strict=True):
        quantised(block.attn.qkv)
        clear.attn.qkv.weight = nn.Parameter(block.attn.qkv.weight.dequantize(), requires_grad=False)
    given = inputs(network)
    answers = []
    for one, how in ((network, engine), (plain, Full())):
        out = ask_one(how, one, **given)
        out.prediction.square().sum().backward()
        gradients = [p.grad.flatten() for p in one.parameters() if p.grad is not None]
        answers.append((out.prediction.detach(), out.tangent, torch.cat(gradients)))
    for found, wanted in zip(*answers, strict=True):
        assert (found - wanted).norm() <= 1e-11 * wanted.norm()
