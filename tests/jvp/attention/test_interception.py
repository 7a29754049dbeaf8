"""Calls of attention in networks: gradient, torch.func.jvp, broadcasting, autocast, every way to pass arguments."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowanchor.jvp.attention import Auto, Math, Streaming, intercept

ENGINES = [Streaming(2, 3), Math(), Auto()]


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def cross_attention(weights, x, text):
    """Tokens x [B, N, 8], which move, ask a text [B, L, 8], which stands."""
    q, k, v = (
        (rows @ weight).unflatten(-1, (2, 4)).transpose(1, 2)
        for rows, weight in zip((x, text, text), weights, strict=True)
    )
    return functional.scaled_dot_product_attention(q, k, v, scale=0.4)


def self_attention(weights, x, text):
    return cross_attention(weights, x, x)


@pytest.mark.parametrize("network", [self_attention, cross_attention])
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_inside_func_jvp_with_gradients_of_parameters(engine, network):
    x, dx, text = rand(2, 5, 8), rand(2, 5, 8, seed=1), rand(2, 7, 8, seed=2)
    weights = [rand(8, 8, seed=seed).requires_grad_() for seed in (3, 4, 5)]

    def run(region):
        def predict(x):
            with region():
                return network(weights, x, text)

        out, tangent = torch.func.jvp(predict, (x,), (dx,))
        return out, tangent, *torch.autograd.grad((out.sin() * out).sum(), weights)

    wanted = run(lambda: sdpa_kernel(SDPBackend.MATH))
    for found, right in zip(run(lambda: intercept(engine)), wanted, strict=True):
        assert relative(found, right) <= 1e-10


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_gradient_reaches_what_has_no_tangent(engine):
    x, dx, text = rand(2, 5, 8), rand(2, 5, 8, seed=1), rand(2, 7, 8, seed=2)
    weights = [rand(8, 8, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    plain = torch.autograd.grad(cross_attention(weights, x, text).sin().sum(), weights)
    with forward_ad.dual_level():
        with intercept(engine):
            out = cross_attention(weights, forward_ad.make_dual(x, dx), text)
        value, _ = forward_ad.unpack_dual(out)
        found = torch.autograd.grad(value.sin().sum(), weights)
    for a, b in zip(found, plain, strict=True):
        assert relative(a, b) <= 1e-10


def attend(region, values, moved, *options, low=None, **named):
    """O and dO of one call."""
    cast = nullcontext() if low is None else torch.autocast("cpu", low)
    with torch.no_grad(), forward_ad.dual_level(), region, cast:
        duals = [forward_ad.make_dual(v, d) for v, d in zip(values, moved, strict=True)]
        if named.pop("by_name", False):
            out = functional.scaled_dot_product_attention(**dict(zip(("query", "key", "value"), duals, strict=True)))
        else:
            out = functional.scaled_dot_product_attention(*duals, *options, **named)
        value, tangent = forward_ad.unpack_dual(out)
        return value.clone(), tangent.clone()


def pair(*shapes, dtype=torch.float64):
    values = [rand(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    return values, [rand(*shape, dtype=dtype, seed=10 + seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    "options, named",
    [
        ((), {"by_name": True}),
        ((None, 0.0, False), {"scale": 0.3}),
        ((None, 0.0, True), {}),
        ((rand(5, 5, seed=7),), {"scale": 0.3}),
    ],
)
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_arguments_by_place_and_by_name(engine, options, named):
    values, moved = pair(*[(2, 2, 5, 4)] * 3)
    wanted = attend(sdpa_kernel(SDPBackend.MATH), values, moved, *options, **named)
    for a, b in zip(attend(intercept(engine), values, moved, *options, **named), wanted, strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize(
    "shapes, named",
    [
        ([(2, 3, 5, 4), (1, 3, 6, 4), (1, 3, 6, 4)], {}),
        ([(2, 3, 5, 4), (2, 3, 6, 4), (1, 1, 6, 4)], {}),
        ([(3, 5, 4)] * 3, {}),
        ([(2, 4, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4)], {"enable_gqa": True}),
    ],
)
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_inputs_that_are_broadcast_or_grouped(engine, shapes, named):
    values, moved = pair(*shapes)
    wanted = attend(sdpa_kernel(SDPBackend.MATH), values, moved, **named)
    for a, b in zip(attend(intercept(engine), values, moved, **named), wanted, strict=True):
        assert a.shape == b.shape and relative(a, b) <= 1e-10


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_autocast_makes_of_the_inputs_what_it_makes_of_a_plain_call(engine, low, given):
    values, moved = pair(*[(1, 2, 5, 8)] * 3, dtype=given)
    exact = attend(sdpa_kernel(SDPBackend.MATH), *([x.double() for x in xs] for xs in (values, moved)))
    with torch.autocast("cpu", low):
        plain = functional.scaled_dot_product_attention(*values)
    for a, b in zip(attend(intercept(engine), values, moved, low=low), exact, strict=True):
        assert a.dtype == plain.dtype
        assert relative(a, b) < 0.03


class Types(TorchDispatchMode):
    """Which types the products and softmaxes inside it are given, in passes forwards and backwards."""

    kinds = ("bmm", "mm", "baddbmm", "_softmax", "_safe_softmax", "_softmax_backward_data")

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.kinds:
            given = {value.dtype for value in args if isinstance(value, torch.Tensor)}
            self.seen.append((name, given | {value for value in args if isinstance(value, torch.dtype)}))
        return func(*args, **(kwargs or {}))


class Softmaxes(TorchFunctionMode):
    """The type of each softmax that is written out, and whether autocast may change it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.softmax, torch._safe_softmax):
            self.seen.append((args[0].dtype, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "keys, named",
    [
        (4, {}),
        (4, {"attn_mask": torch.ones(5, 5).tril() > 0}),
        (4, {"attn_mask": rand(5, 5, dtype=torch.float32)}),
        (2, {"enable_gqa": True}),
    ],
    ids=["plain", "mask", "bias", "grouped"],
)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_the_formula_computes_in_one_type_whatever_autocast_says(low, keys, named):
    """What autocast changes within an operator, the backward on a GPU may refuse: gradients of another type."""
    shapes = [(1, 4, 5, 8), (1, keys, 5, 8), (1, keys, 5, 8)]
    (q, k, v), moved = pair(*shapes, dtype=torch.float32)
    exact = torch.autograd.grad(
        functional.scaled_dot_product_attention(*(x.requires_grad_() for x in (q, k, v)), **named).square().sum(),
        (q, k, v),
    )
    with Types() as types:
        with Softmaxes() as softmaxes, forward_ad.dual_level(), torch.autocast("cpu", low), intercept(Math()):
            duals = [forward_ad.make_dual(x, d) for x, d in zip((q, k, v), moved, strict=True)]
            out = forward_ad.unpack_dual(functional.scaled_dot_product_attention(*duals, **named)).primal
        assert out.dtype == low
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert softmaxes.seen == [(torch.float32, False)], "PyTorch's plain backend is left to autocast"
    assert {name for name, _ in types.seen} >= {"bmm", "_softmax_backward_data"}
    assert all(given == {torch.float32} for _, given in types.seen), types.seen
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32 and relative(a, b) < 0.03


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_a_query_that_may_see_no_key_gets_nothing(engine):
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[0] = False
    values, moved = pair(*[(1, 2, 5, 4)] * 3)
    for a in attend(intercept(engine), values, moved, attn_mask=mask):
        assert a.isfinite().all() and not a[:, :, 0].any() and a[:, :, 1:].any()
