"""With random numbers in a network, prediction, tangent and gradient are those of one function: one draw of them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Answer, Question
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass, compile_blocks

from .networks import CrossNet, ask_both, ask_one, inputs

ENGINES = {
    "chain": Chain(),
    "selective": Chain("selective"),
    "graph": Chain(False),
    "two_pass": TwoPass(),
    "two_pass_checkpoint": TwoPass(checkpoint=True),
    "full": Full(),
    "difference": FiniteDifference(dtype="float64"),
    "difference_checkpoint": FiniteDifference(dtype="float64", checkpoint=True),
}
JOINT = ["chain", "selective", "graph"]


class Layer(nn.Module):
    """A small block."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(16, 16), dropout

    def forward(self, tokens, context):
        c = context.carried[0][:, :1]
        return tokens + functional.dropout(torch.tanh(self.layer(tokens + c)), self.dropout, self.training)


def small(kind: type[CrossNet] = CrossNet, dropout: float = 0.0, depth: int = 2) -> CrossNet:
    """With two of them."""
    network = kind(depth=0)
    network.blocks = nn.ModuleList(Layer(dropout) for _ in range(depth))
    return network


class Ends(CrossNet):
    """Dropout in `embed` and in the head as well."""

    def embed(self, x, t, cond, r=None):
        tokens, context = super().embed(x, t, cond, r)
        carried = functional.dropout(context.carried[0], 0.3, self.training)
        return functional.dropout(tokens, 0.3, self.training), context._replace(carried=(carried,))

    def head(self, tokens, context):
        return functional.dropout(super().head(tokens, context), 0.3, self.training)


def drawing(draw: Any, network: CrossNet) -> CrossNet:
    """A network whose first block keeps a random share of what it adds."""
    block = network.blocks[0]
    forward = block.forward
    block.forward = lambda tokens, context: tokens + draw(tokens) * (forward(tokens, context) - tokens)
    return network


NETWORKS = {
    "blocks": lambda: CrossNet(dropout=0.5),
    "everywhere": lambda: small(Ends, 0.5),
    "python": lambda: drawing(lambda tokens: random.choice([0.2, 1.0, 1.8]), small()),
    "numpy": lambda: drawing(lambda tokens: torch.from_numpy(np.random.rand(*tokens.shape)).to(tokens.dtype), small()),
}


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def compiled_like_inductor(network: CrossNet) -> None:
    """Compiled blocks that repeat what they draw from the same state, and draw other numbers than eager ones."""
    compile_blocks(network, backend="eager")
    for block in network.blocks:
        forward = block.__dict__["forward"]

        def compiled(*given: Any, eager: Any = forward.eager) -> Tensor:
            before = torch.get_rng_state()
            out: Tensor = eager(*given)
            if torch.equal(before, torch.get_rng_state()):
                return out
            torch.set_rng_state(before)
            torch.rand(3)
            return eager(*given)

        forward.compiled = compiled


def is_one_function(engine: Any, network: nn.Module, joint: bool, tolerance: float = 1e-6) -> None:
    """The tangent is the difference quotient of predictions, and the gradient that of losses, from the same seed."""
    given, eps = inputs(network), 1e-6
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn(2, *given["x"].shape, generator=draw).double()
    directions = [torch.randn(p.shape, generator=draw).double() for p in network.parameters()]

    def asked(step: float = 0.0) -> tuple[Answer, Tensor]:
        moved = given | {key: given[key] + step * given[f"tangent_{key}"] for key in ("x", "t")}
        seed(7)
        if not joint:
            dual = ask_one(engine, network, **moved)
            return dual, (dual.prediction * weights[0]).sum()
        dual, other = ask_both(engine, network, **moved, plain=Question(2 - given["t"]))
        return dual, (dual.prediction * weights[0]).sum() + (other * weights[1]).sum()

    network.zero_grad()
    dual, loss = asked()
    after = states()
    loss.backward()
    assert states() == after, "the backward pass leaves the random numbers of what follows alone"
    found = sum((p.grad * d).sum() for p, d in zip(network.parameters(), directions, strict=True) if p.grad is not None)
    quotient = (asked(eps)[0].prediction - asked(-eps)[0].prediction) / (2 * eps)
    assert (dual.tangent - quotient).norm() < tolerance * quotient.norm()
    losses = []
    for sign in (eps, -eps):
        for p, d in zip(network.parameters(), directions, strict=True):
            p.data.add_(sign * d)
        losses.append(asked()[1].detach())
        for p, d in zip(network.parameters(), directions, strict=True):
            p.data.sub_(sign * d)
    wanted = (losses[0] - losses[1]) / (2 * eps)
    assert abs(found - wanted) < tolerance * abs(wanted)


WAYS = [*((name, False) for name in ENGINES), *((name, True) for name in JOINT)]
EAGER = [  # dropout everywhere says all that dropout in the blocks does
    pytest.param(*way, kind, False, marks=[pytest.mark.slow] if kind == "blocks" else [])
    for way in WAYS
    for kind in NETWORKS
]
COMPILED = [  # every way and every kind of network; all of both in `make test-slow`
    pytest.param(*way, kind, True, marks=[] if way == ("chain", True) or kind == "blocks" else [pytest.mark.slow])
    for way in WAYS
    for kind in NETWORKS
]


@pytest.mark.parametrize("name, joint, kind, compiled", [*EAGER, *COMPILED])
def test_one_draw_for_prediction_tangent_and_gradient(name, joint, kind, compiled):
    torch.manual_seed(0)
    network = NETWORKS[kind]().double().train()
    if compiled:
        compiled_like_inductor(network)
    is_one_function(ENGINES[name], network, joint)


def test_a_pass_draws_as_often_as_it_is_long():
    """Every engine leaves the generator where one eager pass leaves it, and evaluation draws nothing."""
    network, after = small(Ends, 0.5).double().train(), set()
    for engine in ENGINES.values():
        torch.manual_seed(3)
        ask_one(engine, network, **inputs(network))
        after.add(torch.rand(1).item())
    assert len(after) == 1
    torch.manual_seed(3)
    ask_one(Chain(), network.eval(), **inputs(network))
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()


@pytest.mark.parametrize("engine", [Chain(), Chain("selective"), Chain(False), TwoPass()], ids=repr)
def test_a_generator_of_its_own_is_refused(engine):
    own = torch.Generator().manual_seed(0)
    network = drawing(lambda tokens: torch.rand(tokens.shape, dtype=tokens.dtype, generator=own), CrossNet()).double()
    with pytest.raises(
        ConfigError, match=r"^The stage blocks.0 \(CrossBlock\) draws from a generator of its own, which"
    ):
        ask_one(engine, network, **inputs(network))
    default = torch.default_generator
    network = drawing(lambda tokens: torch.rand(tokens.shape, dtype=tokens.dtype, generator=default), small()).double()
    is_one_function(engine, network, False)


@pytest.mark.slow
@pytest.mark.parametrize("name, joint", [("chain", True), ("selective", True), ("two_pass_checkpoint", False)])
def test_with_inductor(name, joint):
    torch.manual_seed(0)
    network = small(dropout=0.5, depth=1).double().train()
    compile_blocks(network)
    is_one_function(ENGINES[name], network, joint)
