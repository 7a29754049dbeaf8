"""Attention tangents against the formula, the formula against forward-mode AD; what is computed; what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowanchor.errors import ConfigError
from flowanchor.jvp.attention import Auto, Math, Streaming, Triton, intercept, resolve

from .interpreted import interpreted

SHAPES = [(1, 1, 1, 1, 4), (2, 3, 7, 5, 8), (1, 2, 17, 26, 72), (2, 1, 32, 32, 16), (1, 1, 20, 3, 128)]
WHICH = [(True, True, True), (True, False, False), (False, True, True), (False, False, True), (False, True, False)]


def tensors(shape, dtype=torch.float64, which=(True, True, True), size: float = 1.0):
    batch, heads, queries, keys, d = shape
    draw = torch.Generator().manual_seed(0)
    q, dq = torch.randn(2, batch, heads, queries, d, generator=draw, dtype=torch.float64)
    k, v, dk, dv = torch.randn(4, batch, heads, keys, d, generator=draw, dtype=torch.float64)
    moved = [tangent.to(dtype) if there else None for tangent, there in zip((dq, dk, dv), which, strict=True)]
    return [(size * q).to(dtype), k.to(dtype), v.to(dtype)], moved


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


@pytest.mark.parametrize("which", WHICH, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula_is_that_of_forward_mode_ad(shape, which):
    values, moved = tensors(shape, which=which)

    def attend(*moving):
        rest = iter(moving)
        q, k, v = (next(rest) if there else value for value, there in zip(values, which, strict=True))
        return torch.softmax(q @ k.mT / shape[-1] ** 0.5, -1) @ v

    primals = tuple(value for value, there in zip(values, which, strict=True) if there)
    wanted = torch.func.jvp(attend, primals, tuple(tangent for tangent in moved if tangent is not None))
    for found, right in zip(Math()(*values, *moved), wanted, strict=True):
        assert (found - right).norm() <= 1e-13 * right.norm() + 1e-14


@pytest.mark.parametrize("which", WHICH, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiles", [(256, 256), (16, 24), (1, 1)], ids=str)
def test_streaming_equals_the_formula(shape, which, tiles):
    values, moved = tensors(shape, which=which)
    for found, right in zip(Streaming(*tiles)(*values, *moved), Math()(*values, *moved), strict=True):
        assert (found - right).norm() <= 1e-12 * right.norm() + 1e-13


def test_large_scores_do_not_overflow_and_a_scale_is_kept():
    values, moved = tensors((1, 2, 20, 30, 8), torch.float32, size=1e4)
    exact = Math()(*(x.double() for x in (*values, *moved)), scale=0.1)
    for found, right in zip(Streaming(8, 8)(*values, *moved, scale=0.1), exact, strict=True):
        assert found.isfinite().all()
        assert relative(found, right) < 1e-3  # scores of 1e4 keep three digits of a difference in float32


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float32, 1e-5)])
def test_half_precision_is_accumulated_in_float32(dtype, limit):
    values, moved = tensors((2, 2, 50, 300, 72), dtype)
    exact = Math()(*(x.double() for x in (*values, *moved)))
    for engine in (Streaming(32, 32), Math()):
        for found, right in zip(engine(*values, *moved), exact, strict=True):
            assert found.dtype == dtype
            assert relative(found, right) < limit


def test_what_has_no_tangent_costs_nothing():
    """Products: two for the values, and of the four others those that have a tangent in them."""
    shape = (1, 2, 32, 48, 16)
    product = 2 * 2 * 32 * 48 * 16
    wanted = {(True, True, True): 6, (True, False, False): 4, (False, True, True): 5, (False, False, True): 3}
    for which, products in wanted.items():
        values, moved = tensors(shape, which=which)
        for engine in (Math(), Streaming(16, 16)):
            with FlopCounterMode(display=False) as counter:
                engine(*values, *moved)
            assert counter.get_total_flops() == products * product, (engine, which)


def test_streaming_needs_memory_linear_in_the_tokens():
    from torch.profiler import ProfilerActivity, profile

    def peak(engine, tokens: int) -> int:
        values, moved = tensors((1, 2, tokens, tokens, 16), torch.float32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            engine(*values, *moved)
        live = top = 0
        for event in measured.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                top = max(top, live)
        return top

    streaming = Streaming(64, 64)
    assert peak(streaming, 1024) < 2.2 * peak(streaming, 512)
    assert peak(Math(), 1024) > 3.5 * peak(Math(), 512)
    assert peak(streaming, 1024) < 0.1 * peak(Math(), 1024)


def test_tiles_of_streaming_are_larger_on_a_gpu():
    """Where each costs launches, and not the cache."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 2, 4, 8, device="cuda")
        assert Streaming().sides(q) == (1024, 4096) and Streaming(64).sides(q) == (64, 4096)
        assert Streaming().sides(torch.empty(1, 2, 4, 8)) == (256, 256)


# ---------------------------------------------------------------------------------------------------- interception


def attend_dual(values, moved, region, grad: bool = False, **options):
    with torch.set_grad_enabled(grad), forward_ad.dual_level(), region:
        duals = [v if d is None else forward_ad.make_dual(v, d) for v, d in zip(values, moved, strict=True)]
        out = functional.scaled_dot_product_attention(*duals, **options)
        value, tangent = forward_ad.unpack_dual(out)
        return value.clone(), tangent.detach().clone()


@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril() > 0}]
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", [Streaming(2, 3), Math(), Auto()], ids=repr)
def test_a_call_is_answered_with_a_dual(engine, grad, options):
    values, moved = tensors((2, 2, 5, 5, 8))
    wanted = attend_dual(values, moved, sdpa_kernel(SDPBackend.MATH), **options)
    values = [value.requires_grad_(grad) for value in values]
    found = attend_dual(values, moved, intercept(engine), grad, **options)
    assert relative(found[0].detach(), wanted[0]) < 1e-12 and relative(found[1], wanted[1]) < 1e-12
    if grad:
        weights = torch.randn(found[0].shape, dtype=torch.float64)
        found = torch.autograd.grad((found[0] * weights).sum(), values)
        plain = (functional.scaled_dot_product_attention(*values, **options) * weights).sum()
        for a, b in zip(found, torch.autograd.grad(plain, values), strict=True):
            assert relative(a, b) < 1e-12


def test_plain_calls_are_left_alone():
    values, _ = tensors((1, 1, 4, 4, 4))
    wanted = functional.scaled_dot_product_attention(*values)
    with intercept(Streaming()):
        assert torch.equal(functional.scaled_dot_product_attention(*values), wanted)


def test_inside_func_jvp():
    values, moved = tensors((1, 2, 6, 9, 8))
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(functional.scaled_dot_product_attention, tuple(values), tuple(moved))

    def attend(*args):
        with intercept(Streaming(4, 4)):
            return functional.scaled_dot_product_attention(*args)

    for found, right in zip(torch.func.jvp(attend, tuple(values), tuple(moved)), wanted, strict=True):
        assert relative(found, right) < 1e-12


def test_under_autocast_it_is_low_precision_as_elsewhere():
    values, moved = tensors((1, 2, 6, 9, 8), torch.float32)
    exact = attend_dual(values, moved, sdpa_kernel(SDPBackend.MATH))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_dual(values, moved, intercept(Streaming()))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16 and relative(a, b) < 0.02


# ----------------------------------------------------------------------------------------------------------- triton

EVERY_CASE = """
import json, sys
import torch
from flowanchor.jvp.attention import Math, Triton
found = {}
for shape, which, kind in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    batch, heads, queries, keys, d = shape
    dtype = getattr(torch, kind)
    # As in a network: q and k [B, N, H, d] in memory, v a slice of the joint projection.
    q, dq = torch.randn(2, batch, queries, heads, d).to(dtype).transpose(2, 3)
    k, dk = torch.randn(2, batch, keys, heads, d).to(dtype).transpose(2, 3)
    v, dv = torch.randn(2, batch, keys, 3, heads, d).to(dtype)[:, :, :, 2].transpose(2, 3)
    moved = [tangent if there else None for tangent, there in zip((dq, dk, dv), which)]
    exact = Math()(*(x.double() for x in (q, k, v)), *(None if x is None else x.double() for x in moved))
    errors = []
    for a, b in zip(Triton()(q, k, v, *moved), exact):
        assert a.dtype == dtype
        errors.append(float((a.double() - b).norm() / b.norm().clamp_min(1e-9)))
    found[str((shape, which, kind))] = max(errors)
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton has wheels for Linux only")
def test_the_kernel_under_tritons_interpreter():
    pytest.importorskip("triton")
    shapes = [(2, 1, 33, 40, 128), (1, 1, 40, 20, 96), (1, 1, 5, 9, 8), (1, 1, 17, 33, 256)]
    cases = [(shape, which, "float32") for shape in shapes for which in WHICH[:4]]
    cases += [((1, 2, 70, 50, 72), which, "float32") for which in (WHICH[0], WHICH[2])]
    cases += [((1, 2, 21, 37, d), WHICH[0], "float32") for d in (48, 64, 80, 88, 112, 160)]
    cases += [((1, 2, 40, 70, d), WHICH[0], kind) for d in (72, 128) for kind in ("bfloat16", "float16")]
    found = interpreted(EVERY_CASE, json.dumps(cases), Path(__file__).parent)
    assert len(found) == len(cases)
    limits = {"float32": 1e-6, "bfloat16": 0.02, "float16": 0.003}
    for case, error in found.items():
        assert error < limits[case.rstrip(")'").split("'")[-1]], (case, error)


@pytest.mark.gpu
@pytest.mark.parametrize("kind, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("shape", [(2, 4, 256, 256, 72), (1, 2, 1000, 512, 128), (1, 2, 1024, 1024, 72)], ids=str)
def test_the_kernel_on_a_gpu(shape, kind, limit):
    for which in WHICH[:4]:
        values, moved = tensors(shape, kind, which)
        exact = Math()(*(x.double() for x in values), *(None if x is None else x.double() for x in moved))
        on = [None if x is None else x.cuda() for x in (*values, *moved)]
        for found, right in zip(Triton()(*on), exact, strict=True):
            assert relative(found.cpu(), right) < limit


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_input():
    values, moved = tensors((1, 1, 4, 4, 4))
    with pytest.raises(
        ConfigError, match="jvp.attention=flash is unknown: choose one of auto, math, streaming, triton"
    ):
        resolve("flash")
    assert isinstance(resolve("auto"), Auto) and resolve(Math()).__class__ is Math
    with pytest.raises(ConfigError, match="Tiles of 0 queries"):
        Streaming(tile_queries=0)
    for kind in (Triton, Auto):
        with pytest.raises(ConfigError, match="precision=tf33 is unknown: choose auto, ieee, tf32x3, tf32"):
            kind(precision="tf33")
        with pytest.raises(ConfigError, match="autotune=always is unknown: choose true or false"):
            kind(autotune="always")
    with pytest.raises(ConfigError, match=r"k of shape \(1, 1, 4, 4\) with a tangent of shape \(1, 1, 3, 4\)"):
        Streaming()(*values, moved[0], moved[1][:, :, :3], moved[2])
    with pytest.raises(ConfigError, match="do not belong together"):
        Math()(values[0], values[1], values[2][:, :, :2], None, None, moved[2][:, :, :2])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="jvp/attention=triton .*choose jvp/attention=streaming"):
            Triton()(*values, *moved)
