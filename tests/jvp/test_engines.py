"""Every engine against torch.func.jvp, on networks of two kinds; what an engine keeps; what it refuses."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Question
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass, compile_blocks

from .networks import RELEASED, CrossNet, ask_both, ask_one, inputs, lightningdit

EXACT = {
    "chain": Chain(),
    "selective": Chain("selective"),
    "graph": Chain(False),
    "two_pass": TwoPass(),
    "two_pass_checkpoint": TwoPass(checkpoint=True),
    "streaming": Chain(attention="streaming"),
    "graph_streaming": Chain(False, attention="streaming"),
    "full_streaming": Full(attention="streaming"),
}
NETWORKS = {
    "released": lambda: lightningdit(**RELEASED),
    "dit": lambda: lightningdit(),
    "second_time": lambda: lightningdit(auxiliary_time_cond=True, use_qknorm=True, wo_shift=True),
    "cross_attention": lambda: CrossNet(),
}
WALKING = [name for name in EXACT if not name.startswith("full")]


def network_of(name: str, dtype: torch.dtype = torch.float64) -> Backbone:
    torch.manual_seed(0)
    return NETWORKS[name]().to(dtype).eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def answer(engine, network, given, extra=None):
    """Prediction, tangent, and gradients of a fixed functional of the prediction (and of a plain one, if asked)."""
    network.zero_grad()
    weights = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(2)).to(given["x"].dtype)
    if extra is None:
        dual, loss = ask_one(engine, network, **given), 0.0
    else:
        dual, plain = ask_both(engine, network, **given, plain=extra)
        loss = (plain * weights.flip(0)).sum()
    (loss + (dual.prediction * weights).sum()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return dual.prediction.detach(), dual.tangent, gradients


class Separate(Full):
    """In two calls."""

    def ask_both(self, network, plain, **given):
        return self(network, **given), network.predict(given["x"], plain.t, given["cond"], plain.r)


def earlier(given) -> Question:
    return Question(2 - given["t"], given.get("r"))


@cache
def wanted(kind, dtype=torch.float64, both=False):
    """What torch.func.jvp answers."""
    network = network_of(kind, dtype)
    given = inputs(network, dtype=dtype)
    return answer(Separate(), network, given, earlier(given) if both else None)


def assert_equal(found, wanted, exact: float, gradient: float) -> None:
    assert relative(found[0], wanted[0]) <= exact
    assert relative(found[1], wanted[1]) <= exact
    assert found[2].keys() == wanted[2].keys()
    whole = torch.cat([g.flatten() for g in wanted[2].values()]).double().norm()
    for name, value in wanted[2].items():
        difference = (found[2][name].double() - value.double()).norm()
        assert difference <= gradient * max(float(value.double().norm()), 1e-3 * float(whole)), name


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_engine_equals_full(name, kind):
    network = network_of(kind)
    assert_equal(answer(EXACT[name], network, inputs(network)), wanted(kind), 1e-10, 1e-9)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", EXACT)
def test_in_float32_too(name, kind):
    network = network_of(kind, torch.float32)
    given = inputs(network, dtype=torch.float32)
    assert_equal(answer(EXACT[name], network, given), wanted(kind, torch.float32), 1e-5, 1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_full_equals_central_differences(kind):
    network = network_of(kind)
    given = inputs(network)
    _, tangent, _ = wanted(kind)
    step, ways = 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            moved = {k: given[k] + sign * step * given[f"tangent_{k}"] for k in ("x", "t", "r") if k in given}
            ways.append(network.predict(moved["x"], moved["t"], given["cond"], moved.get("r")))
    assert relative(tangent, (ways[0] - ways[1]) / (2 * step)) < 1e-8


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("recompute", [True, "selective", False])
def test_a_joint_walk_equals_two_calls(recompute, kind):
    network = network_of(kind)
    given = inputs(network)
    plain = earlier(given)
    found = answer(Chain(recompute), network, given, plain)
    assert_equal(found, wanted(kind, both=True), 1e-10, 1e-9)
    dual, also = ask_both(Chain(recompute), network, **given, plain=plain)
    assert relative(also, network.predict(given["x"], plain.t, given["cond"], plain.r)) < 1e-14


@pytest.mark.parametrize("name", WALKING)
def test_gradients_reach_what_is_upstream_of_the_network(name):
    """Inputs that need gradient get it: a learned condition, or x itself."""
    network = network_of("cross_attention")
    found = []
    for engine in (EXACT[name], Full()):
        given = inputs(network)
        given["cond"].requires_grad_()
        ask_one(engine, network, **given).prediction.square().sum().backward()
        found.append(given["cond"].grad)
    assert relative(*found) < 1e-12


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_finite_differences_have_the_stated_error(kind, dtype, limit):
    network = network_of(kind, dtype)
    for parameter in network.parameters():  # as smooth as a trained network
        parameter.data.mul_(0.3)
    given = inputs(network, dtype=dtype)
    exact = ask_one(Full(), network, **given)
    dual = ask_one(FiniteDifference(dtype=dtype), network, **given)
    assert relative(dual.tangent, exact.tangent) < limit
    assert dual.tangent.dtype == dtype and not dual.tangent.requires_grad
    assert relative(dual.prediction, exact.prediction) < 1e-6


def test_finite_differences_in_float64_of_a_float32_network():
    network = network_of("released", torch.float32)
    given = inputs(network, dtype=torch.float32)
    exact = ask_one(Full(), network, **given)
    assert relative(ask_one(FiniteDifference(dtype="float64"), network, **given).tangent, exact.tangent) < 2e-6
    assert {p.dtype for p in network.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------------- random state, autocast


@pytest.mark.parametrize("recompute", [True, "selective", False])
def test_recomputation_repeats_the_random_state_of_the_forward(recompute):
    """With dropout in the blocks the gradient must be that of the very function that gave the prediction."""
    network = CrossNet(dropout=0.5).double().train()
    given = inputs(network)
    torch.manual_seed(7)
    found = answer(Chain(recompute), network, given)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert_equal(found, answer(Full(), network, given), 1e-10, 1e-9)
    assert torch.equal(after, torch.rand(1)), "the engine draws as often as the plain dual pass"


@pytest.mark.parametrize("name", WALKING)
def test_under_autocast_every_weight_gets_its_gradient(name):
    """bfloat16: prediction and tangent near float32's; gradients alike, whatever ran without a graph before."""
    network = network_of("released", torch.float32)
    given = inputs(network, dtype=torch.float32)
    exact = wanted("released", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():  # a teacher's share of the step, on the same weights
            network.predict(given["x"], given["t"], given["cond"])
        network.zero_grad()
        plain = network.predict(given["x"], given["t"], given["cond"])
        dual = ask_one(EXACT[name], network, **given)
        loss = dual.prediction.float().sum() + plain.float().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
    assert relative(dual.prediction, exact[0]) < 0.05
    assert relative(dual.tangent, exact[1]) < 0.1
    doubled = answer(TwoPass(), network, given)[2]  # float32, of another functional: only to see that sizes are sane
    assert doubled.keys() == exact[2].keys()


# --------------------------------------------------------------------------------------------------- what is kept


def kept_by(engine, network, given) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dual = ask_one(engine, network, **given)
    assert dual.prediction.requires_grad and not dual.tangent.requires_grad
    return kept


def test_recomputation_saves_one_input_per_block_and_no_tangent():
    tokens = (3, 4, 16)
    for depth in (2, 5):
        network = lightningdit(depth=depth, **RELEASED)
        given = inputs(network, dtype=torch.float32)
        inside: list[torch.Tensor] = []
        for block in network.blocks:  # a block is called once, by the dual pass: what comes in carries a tangent
            block.register_forward_pre_hook(lambda module, args, into=inside: into.append(args[0]))
        kept = {t.untyped_storage()._cdata: t for t in kept_by(Chain(), network, given) if t.shape == tokens}
        assert len(inside) == depth
        inputs_of_stages = {t.untyped_storage()._cdata for t in inside}
        assert inputs_of_stages <= set(kept)
        # the inputs of the blocks, and that of the head: nothing else of that size
        assert len(kept) == depth + 1
        tangent_of = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in inside]
        assert tangent_of == [None] * depth, "the level of forward AD has ended, and its tangents with it"


def test_recompute_false_keeps_no_tangents_graph():
    """What the graph keeps is what a plain forward keeps, and the outputs of the linear layers."""
    network = lightningdit(**RELEASED)
    given = inputs(network, dtype=torch.float32)
    size = lambda kept: sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values())  # noqa: E731
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        network.predict(given["x"], given["t"], given["cond"])
    plain, graph, full = size(kept), size(kept_by(Chain(False), network, given)), size(kept_by(Full(), network, given))
    assert graph <= 1.35 * plain
    assert full > 1.3 * graph


def test_a_parameters_own_hooks_fire_once_with_the_whole_gradient():
    network, seen = network_of("released"), []
    weight = network.blocks[0].attn.qkv.weight
    weight.register_hook(lambda g: seen.append(g) or 2 * g)
    given = inputs(network)
    found = answer(Chain(), network, given)[2]["blocks.0.attn.qkv.weight"].clone()
    assert len(seen) == 1
    assert relative(found, 2 * seen[0]) < 1e-14


def test_without_grad_nothing_is_recorded():
    network = network_of("released")
    with torch.no_grad():
        dual = ask_one(Chain(), network, **inputs(network))
    assert not dual.prediction.requires_grad
    assert relative(dual.tangent, ask_one(Full(), network, **inputs(network)).tangent) < 1e-12


def test_frozen_parameters_get_no_gradient_and_cost_nothing():
    network = network_of("cross_attention")
    network.blocks[0].requires_grad_(False)
    found = answer(Chain(), network, inputs(network))[2]
    assert not any(name.startswith("blocks.0") for name in found)
    assert_equal(answer(Chain(), network, inputs(network)), answer(Full(), network, inputs(network)), 1e-10, 1e-9)


def test_linear_layers_are_multiplied_twice_not_three_times():
    """PyTorch's own rule multiplies by a weight tangent of zeros; text without a tangent is multiplied once."""
    from torch.utils.flop_counter import FlopCounterMode

    network = network_of("cross_attention")
    given = inputs(network)

    def flops(call) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops()

    plain = flops(lambda: network.predict(given["x"], given["t"], given["cond"]))
    ratio = flops(lambda: ask_one(Chain(attention="math"), network, **given)) / plain
    assert 1.7 < ratio < 2.2  # below 2: the text; attention adds a little: six products against two


# ------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("name", [*WALKING, "full_streaming"])
def test_compiled_blocks(name):
    network = network_of("released", torch.float32)
    compile_blocks(network, backend="aot_eager" if name == "chain" else "eager")
    assert list(network.state_dict()) == list(network_of("released").state_dict())
    assert_equal(
        answer(EXACT[name], network, inputs(network, dtype=torch.float32)),
        wanted("released", torch.float32),
        1e-5,
        1e-5,
    )


# ----------------------------------------------------------------------------------------------------- bad input


class Unstaged(nn.Module):
    def forward(self, x, t, cond, r=None):
        return x


class Odd(CrossNet):
    """A network whose first block does something that no stage may do."""

    def __init__(self, deed) -> None:
        super().__init__()
        self.blocks[0].forward = deed


def in_place(tokens, context):
    tokens += 1
    return tokens * 2


def handed_on(tokens, context):
    return tokens[:, :]


@pytest.mark.parametrize("engine", [Chain(), Chain(False), Chain("selective"), TwoPass()], ids=repr)
def test_bad_stages_are_named(engine):
    given = inputs(CrossNet())
    with pytest.raises(ConfigError, match=r"^Unstaged is no chain of stages.*jvp=full"):
        ask_one(engine, Unstaged(), **given)
    empty = CrossNet(depth=0).double()
    with pytest.raises(ConfigError, match=r"^CrossNet is no chain of stages"):
        ask_one(engine, empty, **given)
    for deed, sentence in [(in_place, "changes its input in place"), (handed_on, "returns its input or a view of it")]:
        with pytest.raises(ConfigError, match=rf"^The stage blocks.0 \(CrossBlock\) {sentence}"):
            ask_one(engine, Odd(deed).double(), **given)


@pytest.mark.parametrize("engine", [*EXACT.values(), FiniteDifference()], ids=repr)
def test_tangents_must_fit(engine):
    network = network_of("released", torch.float32)
    given = inputs(network, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"A tangent of shape \(2,\) was given for t of shape \(3,\)"):
        ask_one(engine, network, **{**given, "tangent_t": torch.ones(2)})
    with pytest.raises(ConfigError, match="A tangent of r was given without r"):
        ask_one(engine, network, **given, tangent_r=torch.ones(3))


def test_a_stage_that_borrows_a_parameter_is_refused():
    """A weight that a block takes from elsewhere would silently get no gradient."""
    network = network_of("cross_attention")
    borrowed = nn.Parameter(torch.randn(16, 16).double())
    block = network.blocks[1]
    original = type(block).forward
    block.forward = lambda tokens, context: functional.linear(original(block, tokens, context), borrowed)
    with pytest.raises(ConfigError, match=r"blocks.1 \(CrossBlock\) uses a trainable tensor of shape \(16, 16\)"):
        answer(Chain(), network, inputs(network))


def test_a_second_backward_repeats_the_first_or_says_why_not():
    network = network_of("released")
    for engine in (Chain(), Chain("selective")):
        network.zero_grad()
        loss = ask_one(engine, network, **inputs(network)).prediction.square().sum()
        loss.backward(retain_graph=True)
        once = network.blocks[0].attn.qkv.weight.grad.clone()
        if engine.recompute == "selective":
            with pytest.raises(ConfigError, match="differentiated a second time.*choose jvp.recompute=true"):
                loss.backward()
        else:
            loss.backward()
            assert relative(network.blocks[0].attn.qkv.weight.grad, 2 * once) < 1e-14


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="jvp.recompute=sometimes is unknown: choose true, false or selective"):
        Chain("sometimes")
    with pytest.raises(ConfigError, match="jvp=full cannot be checkpointed.*choose jvp=chain"):
        Full(checkpoint=True)
    with pytest.raises(ConfigError, match="jvp.dtype=bfloat16 cannot carry finite differences"):
        FiniteDifference(dtype="bfloat16")
    with pytest.raises(ConfigError, match="jvp.eps=0 must be a positive step"):
        FiniteDifference(eps=0)


def test_finite_differences_refuse_the_products_of_a_gpu():
    """Fake tensors of a GPU: nothing is computed before the refusal."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    network = network_of("released", torch.float32)
    given = inputs(network, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with FakeTensorMode(), pytest.raises(ConfigError, match="matmul_precision=high on a GPU.*jvp=chain"):
            moving = ("x", "t", "tangent_x", "tangent_t")
            given |= {name: torch.empty(given[name].shape, device="cuda") for name in moving}
            ask_one(FiniteDifference(), network, **given)
    finally:
        torch.set_float32_matmul_precision(before)


def test_finite_differences_refuse_low_precision():
    network = network_of("released", torch.float32)
    given = inputs(network, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="choose jvp=chain"):
        ask_one(FiniteDifference(), network, **given)
    for precision in ("high", "medium"):
        with pytest.raises(ConfigError, match=f"matmul_precision={precision} on a GPU: add matmul_precision=highest"):
            FiniteDifference().check_products(precision)
        FiniteDifference(dtype="float64").check_products(precision)
    FiniteDifference().check_products("highest")
    low = copy.deepcopy(network).bfloat16()
    with pytest.raises(ConfigError, match="trainer.precision=32-true"):
        ask_one(FiniteDifference(), low, **given)
