"""Tangents of functions of which one operand stands: bit for bit PyTorch's own rule, and cheaper."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from flowanchor.jvp import Chain, dual
from flowanchor.jvp.attention import Math

from .networks import RELEASED, ask_one, inputs, lightningdit


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SUMS_AND_PRODUCTS = {
    "x * y": lambda x, y: x * y,
    "y * x": lambda x, y: y * x,
    "x * 0.3": lambda x, y: x * 0.3,
    "2 * x": lambda x, y: 2 * x,
    "torch.mul": torch.mul,
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: torch.add(y, x),
    "1 + x": lambda x, y: 1 + x,
    "x * x": lambda x, y: x * x,
    "alpha": lambda x, y: torch.add(x, y, alpha=2),
    "transposed": lambda x, y: x.mT * y.mT + y.mT,
    "in place afterwards": lambda x, y: (x + y).mul_(2) + x,
}
# Shapes and types of the moving and the standing operand.
OPERANDS = [
    ((3, 4, 5), torch.float32, (3, 4, 5), torch.float32),
    ((3, 1, 5), torch.float32, (4, 5), torch.float32),
    ((1, 5), torch.float32, (3, 4, 5), torch.float32),
    ((3, 4, 5), torch.bfloat16, (4, 5), torch.float32),
    ((3, 4, 5), torch.float32, (4, 5), torch.bfloat16),
    ((3, 4, 5), torch.float64, (4, 5), torch.int64),
]


@pytest.mark.parametrize("operands", OPERANDS, ids=str)
@pytest.mark.parametrize("name", SUMS_AND_PRODUCTS)
def test_sums_and_products(name, operands):
    shape, dtype, other, other_dtype = operands
    x, dx, y = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1), rand(*other, dtype=other_dtype, seed=2)

    def moved(rules):
        with patch.object(dual, "_RULES", rules), torch.no_grad(), dual.tangents(Math()):
            out = forward_ad.unpack_dual(SUMS_AND_PRODUCTS[name](forward_ad.make_dual(x, dx.clone()), y))
            return out.primal.clone(), out.tangent.clone()

    for found, wanted in zip(moved(dual._RULES), moved({}), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)


def test_a_whole_network_bit_for_bit_without_empty_tangents():
    network = lightningdit(**RELEASED).eval()
    given = inputs(network, dtype=torch.float32)

    class Zeros(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += "_efficientzerotensor" in str(func)
            return func(*args, **(kwargs or {}))

    found, made = [], []
    for rules in (dual._RULES, {}):
        with patch.object(dual, "_RULES", rules), torch.no_grad():
            ask_one(Chain(), network, **given)  # watched
            found.append(ask_one(Chain(), network, **given))
            with Zeros() as zeros:
                ask_one(Chain(), network, **given)
        made.append(zeros.made)
    assert torch.equal(found[0].prediction, found[1].prediction) and torch.equal(found[0].tangent, found[1].tangent)
    assert made[0] < 0.5 * made[1]


@pytest.mark.parametrize("grad", [False, True])
def test_gradient_flows_through_the_values(grad):
    x, y = (
        rand(3, 4, dtype=torch.float64).requires_grad_(grad),
        rand(4, dtype=torch.float64, seed=1).requires_grad_(grad),
    )
    with dual.tangents(Math()):
        out = forward_ad.make_dual(x, torch.ones_like(x)) * y + y
        value = forward_ad.unpack_dual(out).primal
    assert value.requires_grad == grad
    if grad:
        found = torch.autograd.grad(value.sin().sum(), (x, y))
        wanted = torch.autograd.grad((x * y + y).sin().sum(), (x, y))
        assert all(map(torch.equal, found, wanted))


def test_a_weight_is_cast_once_for_both_products():
    x, weight, bias = rand(3, 8), rand(4, 8, seed=1), rand(4, seed=2)

    class Casts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                self.shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), dual.tangents(Math()):
        with Casts() as casts:
            out = forward_ad.unpack_dual(functional.linear(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias))
        assert casts.shapes.count((4, 8)) == 1
        assert torch.equal(out.primal, functional.linear(x, weight, bias))
        assert torch.equal(out.tangent, functional.linear(torch.ones_like(x), weight))
