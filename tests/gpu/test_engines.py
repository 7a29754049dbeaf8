"""Tangent engines on the device: against torch.func in float32, under autocast, with dropout, compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.conditioning import Classes
from flowanchor.interfaces import Backbone, Question, StageContext
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass, compile_blocks

from .device import CUDA, DEVICE, autocast, batch_of, exactly, facm, gradient, needs_it, network, off, taught_by

pytestmark = needs_it
ENGINES = {
    "chain": Chain(),
    "selective": Chain("selective"),
    "graph": Chain(False),
    "two_pass": TwoPass(),
    "checkpointed": TwoPass(checkpoint=True),
    "finite_difference": FiniteDifference(),
    "full": Full(),
}


def step(engine: Any, low: bool, compiled: bool = False, seed: int = 7) -> Tensor:
    """The gradient of a FACM step with a guided teacher."""
    exactly()
    student, teacher = network(), network(1)
    if compiled:
        for made in (student, teacher):
            compile_blocks(made, **({} if CUDA else {"backend": "eager"}))
    batch, noise, t = batch_of(4, student)
    torch.manual_seed(seed)
    with autocast(low):
        loss = facm()(student, batch, taught_by(teacher), engine, noise, t).loss
    loss.backward()
    assert loss.isfinite()
    return gradient(student)


@cache
def reference() -> Tensor:
    return step(Full(), low=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_in_float32_every_engine_gives_the_gradient_of_full(engine):
    allowed = 5e-3 if engine == "finite_difference" else 2e-5  # of a small difference of large numbers
    assert off(step(ENGINES[engine], low=False), reference()) <= allowed


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "finite_difference"])
def test_under_autocast_it_stays_near(engine):
    assert off(step(ENGINES[engine], low=True), reference()) <= 5e-2


def test_compiled_equals_eager():
    assert off(step(Chain(), low=False, compiled=True), reference()) <= 1e-4


class Dropping(nn.Module):
    """A block that draws random numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        return tokens + functional.dropout(self.linear(functional.silu(tokens)) * context.carried[0], 0.5)


class DroppingNet(Backbone):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.sample_shape, self.conditioning = (6, 3), Classes(10)
        self.inward, self.time, self.outward = nn.Linear(3, dim), nn.Linear(1, dim), nn.Linear(dim, 3)
        self.blocks = nn.ModuleList(Dropping(dim) for _ in range(2))

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        return self.inward(x), StageContext((self.time(t[:, None])[:, None],), ())

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        return self.outward(tokens)

    def stage_modules(self) -> list[list[nn.Module]]:
        return [[self.inward, self.time], *([block] for block in self.blocks), [self.outward]]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_computed_again_draws_the_same_masks(compiled):
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        student = DroppingNet().to(DEVICE)
        if compiled:
            compile_blocks(student, **({} if CUDA else {"backend": "eager"}))
        batch, _, t = batch_of(4, student)
        torch.manual_seed(3)
        along = (torch.ones_like(batch.x1), torch.ones_like(t))
        (dual,) = Chain(recompute)(student, batch.x1, batch.cond, [Question(t, along=along)])
        dual.prediction.square().sum().backward()
        found.append(gradient(student))
    assert off(*found) <= 1e-5
