"""The compiled dual pass against the eager one, gradients too; one graph for all blocks; what runs eagerly, and why."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Question
from flowanchor.jvp import Chain, Full, TwoPass, compile_blocks, compiled_forms
from flowanchor.jvp.compiled import choices
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.text.base import Tokens

from .networks import RELEASED, CrossNet, ask_both, ask_one, inputs, lightningdit

SMALL = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}


def of_sit(kind):
    network = kind(**SMALL, num_classes=5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def wan():
    from flowanchor.plugins.backbones.wan import Wan

    network = Wan(4, 1, 4, 4, 2, 12, ffn_dim=32, num_layers=2, freq_dim=16, text_dim=5, text_len=4)
    nn.init.normal_(network.proj_out.weight, std=0.3)
    return network


NETWORKS = {
    "released": lambda: lightningdit(**RELEASED),
    "second_time": lambda: lightningdit(auxiliary_time_cond=True, use_qknorm=True, wo_shift=True, predicts="x"),
    "sit": lambda: of_sit(SiT),
    "dit": lambda: of_sit(DiT),
    "wan": wan,
    "cross_attention": CrossNet,
}
ENGINES = {"chain": Chain(), "selective": Chain("selective"), "graph": Chain(False), "two_pass": TwoPass()}


@pytest.fixture(autouse=True)
def fresh():
    compiled_forms._KINDS.clear()


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    network = NETWORKS[kind]().to(dtype).eval() if isinstance(kind, str) else kind.to(dtype)
    given = inputs(network, dtype=dtype)
    if kind == "wan":
        given["cond"] = Tokens(torch.randn(3, 4, 5, dtype=dtype))
    return network, given


def answer(engine, network, given):
    """Prediction, tangent and gradients of one step."""
    network.zero_grad()
    if isinstance(engine, (Chain, Full)):
        dual, other = ask_both(engine, network, **given, plain=Question(2 - given["t"], given.get("r")))
        loss = other.square().sum()
    else:
        dual, loss = ask_one(engine, network, **given), 0.0
    (dual.prediction.sin().sum() + loss).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    gradients = [getattr(gradient, "_local_tensor", gradient).flatten() for gradient in gradients]
    return dual.prediction.detach(), dual.tangent, torch.cat(gradients)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def forms():
    """How many passes were compiled, and how many have to run eagerly."""
    found = [graph for kind in compiled_forms._KINDS.values() for graph in kind.forms.values()]
    return sum(graph is not None for graph in found), sum(graph is None for graph in found)


GRAPHS = {"chain": 1, "selective": 3, "graph": 2, "two_pass": 1}  # a tangent pass; one that records, one that replays


def compile_duals(network, backend="eager"):
    """The blocks' ordinary passes, of which test_engines.py and the compatibility matrix tell, stay eager."""
    compile_blocks(network, backend=backend)
    for block in network.blocks:
        for part in choices(block):
            part.forward.compiled = part.forward.eager


def compare(engine, network, given, limit, backend="eager", compiled=(1, 0)):
    """By the graphs as they were traced; `aot_eager` takes them apart as inductor does, for as long again."""
    wanted = answer(engine, network, given)
    compile_duals(network, backend)
    for _ in range(2):  # the first walk of a joint step is watched, and runs eagerly
        found = answer(engine, network, given)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= limit
    assert forms() == compiled


@pytest.mark.parametrize(
    "name, kind",
    [
        *(("chain", kind) for kind in NETWORKS),
        *((name, "released") for name in ENGINES if name != "chain"),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in ("selective", "graph")
            for kind in NETWORKS
            if kind != "released"
        ),
    ],
)
def test_equals_the_eager_pass(name, kind):
    """And all blocks of a network share the graphs."""
    compare(ENGINES[name], *made(kind), 1e-12, compiled=(GRAPHS[name], 0))


def test_taken_apart_as_inductor_does():
    compare(Chain("selective"), *made("released"), 1e-12, backend="aot_eager", compiled=(GRAPHS["selective"], 0))


@pytest.mark.parametrize("name", ["chain", pytest.param("selective", marks=pytest.mark.slow)])
def test_two_experts(name):
    """Of Wan 2.2: a pair of blocks asks one, so each side has graphs of its own, and each is right for its weights."""
    from flowanchor.plugins.backbones.wan_experts import WanExperts

    torch.manual_seed(0)
    settings = {"in_channels": 4, "height": 4, "width": 4, "num_attention_heads": 2, "attention_head_dim": 12}
    settings |= {"ffn_dim": 32, "num_layers": 2, "freq_dim": 16, "text_dim": 5, "text_len": 4}
    network = WanExperts(boundary=0.5, preset="nano", **settings).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    given = inputs(network) | {"cond": Tokens(torch.randn(3, 4, 5, dtype=torch.float64))}
    sides = {"high": 0.5 * given["t"], "low": 0.5 + 0.5 * given["t"]}  # noise is 1 - t
    wanted = {side: answer(Full(), network, given | {"t": t}) for side, t in sides.items()}
    compile_duals(network)
    for _ in range(2):  # the first walk is watched, and runs eagerly
        for side, t in sides.items():
            for a, b in zip(answer(ENGINES[name], network, given | {"t": t}), wanted[side], strict=True):
                assert relative(a, b) <= 1e-12
            idle = network.low if side == "high" else network.high
            assert all(p.grad is None for p in idle.parameters())
    assert forms() == (2 * GRAPHS[name], 0)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5)])
def test_in_float32_and_under_autocast(dtype, limit):
    network, given = made("released", dtype)
    compare(Chain(), network, given, limit)
    exact = answer(Chain(), network, given)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found = answer(Chain(), network, given)
    assert forms() == (2, 0), "another precision is another graph"
    assert relative(found[1], exact[1]) < 0.05 and found[1].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["released", "wan"])
def test_with_inductor(kind):
    compare(Chain(), *made(kind), 1e-12, backend="inductor")


def test_shapes_settings_and_modes_have_graphs_of_their_own():
    network, given = made("released")
    compile_duals(network)
    answer(Chain(), network, given)
    for batch in (3, 2, 3):
        some = {name: value[:batch] for name, value in given.items()}
        answer(Chain(), network, some)
    assert forms() == (2, 0)
    for block in network.blocks:
        block.pixel_norm = True
    wanted_of = made("released")[0]
    for block in wanted_of.blocks:
        block.pixel_norm = True
    assert relative(answer(Chain(), network, given)[1], answer(Chain(), wanted_of, given)[1]) < 1e-12
    assert len(compiled_forms._KINDS) == 2


def test_a_weight_that_is_replaced_is_seen():
    network, given = made("released")
    compile_duals(network)
    for _ in range(2):
        answer(Chain(), network, given)
    weight = network.blocks[1].attn.qkv
    weight.weight = nn.Parameter(torch.randn_like(weight.weight))
    other = made("released")[0]
    other.blocks[1].attn.qkv.weight = nn.Parameter(weight.weight.detach().clone())
    assert relative(answer(Chain(), network, given)[1], answer(Chain(), other, given)[1]) < 1e-12
    assert forms() == (1, 0)


def test_the_number_of_graphs_is_bounded(monkeypatch):
    monkeypatch.setattr(compiled_forms, "FORMS", 1)
    network, given = made("released")
    compile_duals(network)
    some = {name: value[:2] for name, value in given.items()}
    wanted = answer(Chain(), made("released")[0], some)
    for _ in range(2):
        answer(Chain(), network, given)
    with pytest.warns(UserWarning, match="blocks.0 .*runs eagerly.*more than 1 shapes or kinds of input"):
        found = answer(Chain(), network, some)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(Chain(), network, some)  # said once
    assert relative(found[1], wanted[1]) == 0 and forms() == (1, 0)


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# The others too, in two processes: tests/compatibility.
@pytest.mark.parametrize(
    "name", ["chain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("selective", "graph", "two_pass"))]
)
def test_a_sharded_network(name, mesh):
    """The whole parameters of a unit are other tensors in each step: they are inputs of the graph."""
    from flowanchor.strategies.sharding import shard_backbone

    network, given = made("released", torch.float32)
    whole, _ = made("released", torch.float32)
    shard_backbone(network, mesh)
    compile_duals(network)
    for _ in range(3):
        found, wanted = (answer(ENGINES[name], part, given) for part in (network, whole))
        for a, b in zip(found, wanted, strict=True):
            assert relative(a, b) <= 1e-5
        with torch.no_grad():  # a step of an optimizer
            for parameter in (*network.parameters(), *whole.parameters()):
                parameter.mul_(0.9)
    assert forms() == (GRAPHS[name], 0)


# ------------------------------------------------------------------------------------------------ what runs eagerly


class Odd(nn.Module):
    """A block that does something with its tokens."""

    def __init__(self, deed):
        super().__init__()
        self.deed, self.layer = deed, nn.Linear(16, 16)

    def forward(self, tokens, context):
        return tokens + self.deed(torch.tanh(self.layer(tokens + context.carried[0][:, :1])))


def odd(deed):
    torch.manual_seed(0)
    network = CrossNet()
    network.blocks = nn.ModuleList(Odd(deed) for _ in range(2))
    return network.train()


TABLE = torch.linspace(1, 2, 16, dtype=torch.float64)


def drawn(x):
    return x * random.choice([0.5, 1.0, 2.0])


@pytest.mark.parametrize("deed", [lambda x: functional.dropout(x, 0.5), lambda x: x * torch.rand_like(x), drawn])
def test_random_numbers(deed):
    """Silently: the random numbers of the walk are those of an eager one."""
    network, given = made(odd(deed))
    compile_duals(network)
    compare_with, _ = made(odd(deed))
    for engine in (Chain(), TwoPass()):
        for other in (network, compare_with):
            answer(engine, other, given)  # watched
        found = []
        for other in (network, compare_with):
            torch.manual_seed(3)
            random.seed(3)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found.append(ask_one(engine, other, **given).tangent)
        assert torch.equal(*found)
    assert forms()[0] == 0 and forms()[1] > 0


@pytest.mark.parametrize(
    "deed, why",
    [
        (lambda x: x * float(x.sum() > 0), "DataDependent"),
        (lambda x: x * TABLE, "RuntimeError|TypeError|AssertionError"),
    ],
    ids=["values on the host", "a tensor of its own"],
)
def test_what_cannot_be_traced(deed, why):
    """Eagerly after one warning, and dual numbers can be made afterwards."""
    network, given = made(odd(deed))
    wanted = answer(Chain(), network, given)
    compile_duals(network)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=f"(?s)tangent pass of blocks.0 .*not compiled: .*({why})") as said:
        found = answer(Chain(), network, given)
        answer(Chain(), network, given)
    assert sum("tangent pass" in str(w.message) for w in said) == 1
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= 1e-12


def test_what_cannot_be_compiled():
    def broken(graph, example):
        raise ValueError("no compiler here")

    network, given = made("released")
    wanted = answer(Chain(), network, given)
    compile_duals(network, broken)
    with pytest.warns(UserWarning, match="(?s)not compiled.*no compiler here"):
        found = answer(Chain(), network, given)
    assert relative(found[1], wanted[1]) == 0 and forms() == (0, 1)


def test_a_block_that_keeps_something():
    """A graph would not keep it, and tracing would leave a tensor without values there."""
    network, given = made("released")
    wanted = answer(Chain(), network, given)
    block = network.blocks[0].mlp
    forward = block.forward

    def counted(x):
        block.seen = x.detach()
        return forward(x)

    block.forward = counted
    compile_duals(network)
    with pytest.warns(UserWarning, match="blocks.0 .*it changes attributes of its modules"):
        found = ask_one(TwoPass(), network, **given)
    assert relative(found.tangent, wanted[1]) <= 1e-12 and block.seen.sum().isfinite()
    first = block.seen
    ask_one(TwoPass(), network, **given)
    assert block.seen is not first and forms() == (2, 0), "the other block is compiled"


def test_hooks_are_called():
    network, given = made("released")
    compile_duals(network)
    calls = []
    network.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    answer(Chain(), network, given)
    answer(TwoPass(), network, given)
    calls.clear()
    ask_one(TwoPass(), network, **given)
    assert calls and forms() == (1, 0), "the other block is compiled"


def test_a_fault_of_the_stage_is_named():
    def in_place(tokens, context):
        tokens += 1
        return tokens * 2

    network, given = made(CrossNet())
    with torch.no_grad():
        ask_one(TwoPass(), network, **given)  # watched
    network.blocks[0].forward = in_place
    compile_duals(network)
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=r"blocks.0 \(CrossBlock\) changes its input"):
        warnings.simplefilter("error")
        ask_one(TwoPass(), network, **given)
