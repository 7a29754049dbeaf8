"""What would lose a tangent between the stages is refused; what only looks like it is computed as it should be."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Question, StageContext
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.jvp.inside import tensors_inside

from .networks import ask_both, ask_one

WALKING = [Chain(), Chain("selective"), Chain(False), TwoPass()]


@dataclass
class Parts:
    time: Any


class Named(NamedTuple):
    time: Any


class Slotted:
    __slots__ = ("time",)

    def __init__(self, time: Tensor) -> None:
        self.time = time

    def get(self) -> Tensor:
        return self.time


class Block(nn.Module):
    def __init__(self, network: Net) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.__dict__["network"] = network

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        time = self.network.time_of(context)
        return tokens + torch.tanh(self.layer(tokens + (0 if time is None else time[:, None])))


class Net(Backbone):
    """Sequences [B, 6, 3]; a subclass says how the embedded time gets from `embed` to the blocks."""

    takes_end_time = True

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.sample_shape = (6, 3)
        self.inward = nn.Linear(3, 8)
        self.time = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8))
        self.end = nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Block(self) for _ in range(2))
        self.outward = nn.Linear(8, 3)
        self.double()

    def embedded(self, t: Tensor, r: Tensor | None) -> Tensor:
        return self.time(t[:, None]) if r is None else self.time(t[:, None]) + self.end(r[:, None])

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        return self.inward(x), self.context(self.embedded(t, r))

    def context(self, time: Tensor) -> StageContext:
        return StageContext((time,))

    def time_of(self, context: StageContext) -> Tensor | None:
        return context.carried[0]

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        return self.outward(tokens)


def given(**more: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, 3, 6, 3, dtype=torch.float64, generator=draw)
    t = torch.rand(3, dtype=torch.float64, generator=draw)
    return {"x": x, "t": t, "cond": None, "tangent_x": dx, "tangent_t": torch.ones_like(t), **more}


def end(**more: Any) -> dict[str, Any]:
    return given(r=torch.full((3,), 0.9, dtype=torch.float64), **more)


def differences(network: Backbone, inputs: dict[str, Any]) -> Tensor:
    step, found = 1e-5, []
    for sign in (step, -step):
        moved = {key: inputs.get(key) for key in ("x", "t", "r")}
        for key in moved:
            if inputs.get(f"tangent_{key}") is not None:
                moved[key] = inputs[key] + sign * inputs[f"tangent_{key}"]
        with torch.no_grad():
            found.append(network.predict(moved["x"], moved["t"], inputs["cond"], moved["r"]))
    return (found[0] - found[1]) / (2 * step)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm().clamp_min(1e-12))


# ------------------------------------------------------------------------------------------------- hidden in `fixed`

HIDDEN = {
    "": (lambda time: time, lambda held: held),
    "['time']": (lambda time: {"text": torch.ones(2), "time": time}, lambda held: held["time"]),
    "[1][0]": (lambda time: (1, [time]), lambda held: held[1][0]),
    ".time": (Named, lambda held: held.time),
    ".time['deep'][0].time": (lambda time: Parts({"deep": [Named(time)]}), lambda held: held.time["deep"][0].time),
    ".time ": (Slotted, lambda held: held.time),
    " (its time)": (lambda time: lambda: 1 * time, lambda held: held()),
    " (its defaults)[0][0]": (lambda time: lambda now=time: now, lambda held: held()),
    " (its arguments)[0][0]": (lambda time: functools.partial(torch.mul, time), lambda held: held(1)),
    ".__self__.time": (lambda time: Slotted(time).get, lambda held: held()),
}


def hiding(way: str) -> Net:
    class Hiding(Net):
        def context(self, time: Tensor) -> StageContext:
            return StageContext((), ("text", HIDDEN[way][0](time)))

        def time_of(self, context: StageContext) -> Tensor:
            return HIDDEN[way][1](context.fixed[1])

    return Hiding()


@pytest.mark.parametrize("way", HIDDEN)
def test_a_tangent_in_fixed_is_refused_where_it_lies(way):
    network = hiding(way)
    assert relative(ask_one(Full(), network, **given()).tangent, differences(network, given())) < 1e-8
    assert (
        relative(ask_one(FiniteDifference(dtype="float64"), network, **given()).tangent, differences(network, given()))
        < 1e-8
    )
    for engine in WALKING:
        for _ in range(2):  # each time, not the first one alone
            with pytest.raises(ConfigError) as refusal:
                ask_one(engine, network, **given())
            wanted = "The stage embed puts a tensor that depends on x or a time into StageContext.fixed, where its "
            wanted += f"derivative is lost (fixed[1]{way.strip() if way.endswith(' ') else way}, of shape (3, 8))"
            assert str(refusal.value).startswith(wanted)
    with pytest.raises(ConfigError, match="StageContext.fixed"):
        ask_both(Chain(), network, **given(), plain=Question(given()["t"]))


def test_a_held_end_and_a_detached_time_may_lie_in_fixed():
    class Held(Net):
        def embed(self, x, t, cond, r=None):
            return self.inward(x), StageContext((self.time(t[:, None]),), ({"end": self.end(r[:, None])}, t.detach()))

        def time_of(self, context):
            return context.carried[0] + context.fixed[0]["end"]

    network = Held()
    for engine in WALKING:
        check(engine, network, end())
        with pytest.raises(ConfigError, match=r"\(fixed\[0\]\['end'\], of shape \(3, 8\)\)"):
            ask_one(engine, network, **end(tangent_r=torch.ones(3, dtype=torch.float64)))


# ----------------------------------------------------------------------------------- kept elsewhere between the stages

GLOBAL: dict[str, Tensor] = {}


class OnItself(Net):
    def context(self, time):
        self.kept = time
        return StageContext(())

    def time_of(self, context):
        return self.kept[:, :]


class OnABlock(OnItself):
    def context(self, time):
        for block in self.blocks:
            block.kept = {"time": [time]}
        return StageContext(())

    def time_of(self, context):
        return torch.cat([self.blocks[0].kept["time"][0], self.blocks[1].kept["time"][0]])[:3]


class InABuffer(OnItself):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(3, 8, dtype=torch.float64))


class InAGlobal(OnItself):
    def context(self, time):
        GLOBAL["time"] = time
        return StageContext(())

    def time_of(self, context):
        return GLOBAL["time"]


class InAClosure(OnItself):
    def context(self, time):
        self.get = lambda: time
        return StageContext(())

    def time_of(self, context):
        return self.get()


class TheTimeItself(OnItself):
    def embed(self, x, t, cond, r=None):
        self.kept = t
        return self.inward(x), StageContext((self.embedded(t, r),))

    def time_of(self, context):
        return self.kept[:, None].expand(-1, 8)


class Skip(Net):
    """Tokens that one block keeps for the next."""

    def time_of(self, context):
        return None

    def __init__(self):
        super().__init__()
        first, second = self.blocks

        def keep(tokens, context):
            self.skip = tokens
            return torch.tanh(first.layer(tokens))

        first.forward = keep
        second.forward = lambda tokens, context: second.layer(tokens) + self.skip


KEPT = [OnItself, OnABlock, InABuffer, InAGlobal, InAClosure, TheTimeItself, Skip]


@pytest.mark.parametrize("kind", KEPT)
def test_what_moves_and_bypasses_the_context_is_refused(kind):
    assert relative(ask_one(Full(), kind(), **given()).tangent, differences(kind(), given())) < 1e-8
    for engine in WALKING:
        with pytest.raises(
            ConfigError, match=r"^The stage blocks.[01] \(Block\) uses a tensor of shape .* in StageContext.carried.$"
        ):  # noqa: E501
            ask_one(engine, kind(), **given())


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("plain", [0.0, 2.0])
def test_in_a_joint_walk_the_other_branch_does_not_hide_it(kind, plain):
    """There the attribute is overwritten by the branch without tangents, which may be told the same time."""
    t = given()["t"]
    for engine in WALKING[:3]:
        with pytest.raises(ConfigError, match=r"^The stage blocks.[01] \(Block\) uses a tensor of shape"):
            ask_both(engine, kind(), **given(), plain=Question(t if plain == 0 else plain - t))


def test_in_a_joint_walk_an_end_that_is_held_may_not_be_kept_either():
    """It has no tangent, but the other branch is told another one."""

    class KeptEnd(Net):
        def embed(self, x, t, cond, r=None):
            self.kept = self.end(r[:, None])
            return self.inward(x), StageContext((self.time(t[:, None]),))

        def time_of(self, context):
            return context.carried[0] + self.kept

    check(Chain(False), KeptEnd(), end())
    for engine in WALKING[:3]:
        with pytest.raises(ConfigError, match="neither as tokens nor in context.carried"):
            ask_both(engine, KeptEnd(), **end(), plain=Question(end()["t"], end()["t"]))


def test_in_a_joint_walk_nothing_that_differs_may_be_kept():
    """Not even what has no derivative: the other branch puts its own in the place."""
    for engine in WALKING:
        ask_one(engine, Late(), **given())
    for engine in WALKING[:3]:
        with pytest.raises(ConfigError, match="neither as tokens nor in context.carried"):
            ask_both(engine, Late(), **given(), plain=Question(2 - given()["t"]))
        ask_both(engine, Late(), **given(), plain=Question(given()["t"]))


# -------------------------------------------------------------------------------------------- lost inside a stage


class DetachedBlock(Net):
    def time_of(self, context):
        return None

    def __init__(self):
        super().__init__()
        layer = self.blocks[1].layer
        self.blocks[1].forward = lambda tokens, context: layer(tokens.detach())


class NumpyHead(Net):
    def head(self, tokens, context):
        return self.outward(torch.from_numpy(np.tanh(tokens.detach().numpy())))


class ItemHead(Net):
    def head(self, tokens, context):
        return self.outward(torch.tensor(tokens.tolist(), dtype=tokens.dtype))


class NumpyTime(Net):
    def embedded(self, t, r):
        return self.time(torch.from_numpy(np.sin(5 * t.numpy()))[:, None])


class ItemTime(Net):
    def embedded(self, t, r):
        return torch.stack([torch.full((8,), value.item() ** 2, dtype=t.dtype) for value in t])


class DataTokens(Net):
    def embed(self, x, t, cond, r=None):
        return self.inward(x.data), StageContext((self.embedded(t, r),))


@pytest.mark.parametrize(
    "kind, what",
    [
        (DetachedBlock, r"blocks.1 \(Block\) returns a tensor of shape \(3, 6, 8\)"),
        (NumpyHead, r"head returns a tensor of shape \(3, 6, 3\)"),
        (ItemHead, r"head returns a tensor of shape \(3, 6, 3\)"),
        (NumpyTime, r"embed returns carried\[0\] of shape \(3, 8\)"),
        (ItemTime, r"embed returns carried\[0\] of shape \(3, 8\)"),
        (DataTokens, r"embed returns a tensor of shape \(3, 6, 8\)"),
    ],
)
def test_what_depends_on_what_moves_and_stands_still_is_refused(kind, what):
    for engine in WALKING:
        with pytest.raises(ConfigError, match=rf"^The stage {what} that depends on x or a time and has no tangent"):
            ask_one(engine, kind(), **given())
        with pytest.raises(ConfigError, match="has no tangent"):
            ask_one(engine, kind(), **given(t=torch.zeros(3, dtype=torch.float64)))
    with pytest.raises(ConfigError, match="has no tangent"):
        ask_both(Chain(), kind(), **given(), plain=Question(given()["t"]))


@pytest.mark.parametrize("kind", [NumpyHead, DetachedBlock])
def test_in_low_precision_too(kind):
    inputs = {k: v if v is None else v.bfloat16() for k, v in given().items()}
    with pytest.raises(ConfigError, match="has no tangent"):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            ask_one(TwoPass(), kind().bfloat16(), **inputs) if kind is DetachedBlock else ask_one(
                Chain(), Bf16Head(), **inputs
            )


class Bf16Head(Net):
    def __init__(self):
        super().__init__()
        self.bfloat16()

    def head(self, tokens, context):
        return self.outward(torch.tensor(tokens.tolist(), dtype=tokens.dtype))


# ------------------------------------------------------------------------------------------------------ innocent


class Watched(Net):
    """Looks at what moves, keeps it, writes it down, and uses nothing of it."""

    def __init__(self):
        super().__init__()
        self.seen: list[float] = []

    def embed(self, x, t, cond, r=None):
        self.now, self.x = t, x
        self.seen.append(t.mean().item())
        assert float(t.max()) <= 2 and len(t.tolist()) == 3
        return super().embed(x, t, cond, r)

    def time_of(self, context):
        self.last = context.carried[0]
        return context.carried[0].type_as(self.now) + (torch.zeros_like(self.now) + len(self.now))[:, None]


class Late(Net):
    """Asks on which side of one half the time is that it kept: no derivative is lost."""

    def embed(self, x, t, cond, r=None):
        self.now = t
        return super().embed(x, t, cond, r)

    def time_of(self, context):
        return context.carried[0] + (self.now > 0.5).to(self.now.dtype)[:, None] + self.now.detach()[:, None]


class Table(Net):
    """A table that every call of `embed` makes again, and its blocks read from an attribute."""

    def embed(self, x, t, cond, r=None):
        self.table = torch.linspace(0, 1, 8, dtype=x.dtype)
        return super().embed(x, t, cond, r)

    def time_of(self, context):
        return context.carried[0] + self.table


class Queries(Net):
    """Tokens that do not move; all that moves is carried."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, 8).double())

    def embed(self, x, t, cond, r=None):
        return self.queries.expand(3, 6, 8) * 1, StageContext((self.embedded(t, r), self.inward(x)))

    def time_of(self, context):
        return context.carried[0] + context.carried[1].mean(1)


class DiscreteTime(Net):
    """A table of times, as of DDPM: its derivative is zero almost everywhere."""

    def embedded(self, t, r):
        return torch.stack([self.inward.weight[:, int(value.item() * 20) % 3] for value in t])


class NoGradTime(Net):
    def embedded(self, t, r):
        with torch.no_grad():
            return super().embedded(t, r)


class Trees(Net):
    """Contexts of tuples, lists and dicts: what is carried, and what is fixed and trained."""

    def embed(self, x, t, cond, r=None):
        fixed = Named({"text": [self.end(torch.ones(3, 1, dtype=x.dtype))]})
        return self.inward(x), StageContext({"time": [self.time(t[:, None])]}, fixed)

    def time_of(self, context):
        return context.carried["time"][0] + context.fixed.time["text"][0]


class Constant(Net):
    def head(self, tokens, context):
        return self.outward.bias.expand(3, 6, 3) * 1


class ConstantBlock(Net):
    def time_of(self, context):
        return None

    def __init__(self):
        super().__init__()
        layer = self.blocks[0].layer
        self.blocks[0].forward = lambda tokens, context: layer.bias.expand(3, 6, 8) * 1


INNOCENT = [Net, Watched, Table, Queries, DiscreteTime, NoGradTime, Trees, Constant, ConstantBlock]


def check(engine: Any, network: Backbone, inputs: dict[str, Any], plain: Question | None = None) -> None:
    """Tangent against central differences, gradients against `Full`; twice, since the first walk is watched."""

    class Separate(Full):
        def ask_both(self, network, plain, **inputs):
            return self(network, **inputs), network.predict(inputs["x"], plain.t, inputs["cond"], plain.r)

    def gradients(engine: Any) -> tuple[Tensor, dict[str, Tensor]]:
        network.zero_grad()
        dual, other = (
            (ask_one(engine, network, **inputs), None)
            if plain is None
            else ask_both(engine, network, **inputs, plain=plain)
        )
        (dual.prediction.square().sum() + (0 if other is None else other.sum())).backward()
        return dual.tangent, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    _, wanted = gradients(Full())
    for _ in range(2):
        tangent, found = gradients(engine)
        assert relative(tangent, differences(network, inputs)) < 1e-8
        assert {name for name, value in found.items() if value.any()} == {n for n, v in wanted.items() if v.any()}
        assert all(relative(found[name], wanted[name]) < 1e-9 for name in wanted if wanted[name].any())


@pytest.mark.parametrize("kind", INNOCENT)
def test_what_only_looks_like_it_is_exact(kind):
    for engine in WALKING:
        check(engine, kind(), given())
    for engine in WALKING[:3]:
        check(engine, kind(), given(), Question(2 - given()["t"]))
        check(engine, kind(), end(tangent_r=torch.ones(3).double()), Question(given()["t"], given()["t"]))


@pytest.mark.parametrize("kind", INNOCENT)
@pytest.mark.parametrize("still", ["tangent_x", "tangent_t", "both"])
def test_directions_that_are_zero(kind, still):
    stopped = {"tangent_x": torch.zeros(3, 6, 3).double(), "tangent_t": torch.zeros(3).double()}
    inputs = given(**(stopped if still == "both" else {still: stopped[still]}))
    for engine in WALKING:
        check(engine, kind(), inputs)


def test_inputs_that_need_gradient_get_it():
    """x, times, and a condition that lies in `fixed` as it is, or nested."""

    class Conditioned(Net):
        def embed(self, x, t, cond, r=None):
            return self.inward(x), StageContext((self.embedded(t, r),), (cond["a"], {"b": cond["b"]}))

        def time_of(self, context):
            return context.carried[0] + context.fixed[0] * context.fixed[1]["b"]

    network, found = Conditioned(), []
    for engine in [Full(), *WALKING]:
        leaves = {name: value.clone().requires_grad_() for name, value in given().items() if name in ("x", "t")}
        cond = {name: torch.full((3, 8), 0.5).double().requires_grad_() for name in "ab"}
        dual = ask_one(engine, network, **given(cond=cond, **leaves))
        dual.prediction.square().sum().backward()
        assert relative(dual.tangent, differences(network, given(cond=cond))) < 1e-8 and not dual.tangent.requires_grad
        found.append([leaf.grad for leaf in (*leaves.values(), *cond.values())])
    for others in found[1:]:
        assert all(relative(a, b) < 1e-12 for a, b in zip(others, found[0], strict=True))


# ----------------------------------------------------------------------------------------------- what a stage returns


def returning(embedded: Any = None, block: Any = None) -> Net:
    network = Net()
    if embedded is not None:
        network.embed = lambda x, t, cond, r=None: embedded(network.inward(x), network.embedded(t, r))
    if block is not None:
        network.blocks[0].forward = lambda tokens, context: block(tokens)
    return network


@pytest.mark.parametrize(
    "network, sentence",
    [
        (lambda: returning(lambda h, c: h), "The stage embed returned a value of type Tensor: return the tokens and"),
        (lambda: returning(lambda h, c: (h, (c,))), r"The stage embed returned \(Tensor, tuple\): return the tokens"),
        (lambda: returning(lambda h, c: (h, StageContext((c, None)))), "The stage embed puts a value of type NoneType"),
        (lambda: returning(lambda h, c: (h, StageContext((c, 2.0)))), "The stage embed puts a value of type float"),
        (lambda: returning(block=lambda h: (h, h)), r"The stage blocks.0 \(Block\) returned \(Tensor, Tensor\)"),
        (lambda: returning(block=lambda h: None), r"The stage blocks.0 \(Block\) returned a value of type NoneType"),
    ],
)  # fmt: skip
def test_what_a_stage_may_not_return(network, sentence):
    for engine in WALKING:
        with pytest.raises(ConfigError, match=f"^{sentence}"):
            ask_one(engine, network(), **given())


def test_where_tensors_are_found():
    a, b = torch.zeros(1), torch.zeros(2)
    ring: list[Any] = [a]
    ring.append(ring)
    assert [way for way, _ in tensors_inside({"k": (a, ring), "m": nn.Linear(1, 1), "n": [1, "text", b]})] == [
        "['k'][0]", "['k'][1][0]", "['n'][2]",
    ]  # fmt: skip
