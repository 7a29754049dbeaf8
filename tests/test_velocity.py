"""A velocity of another shape or type than the samples is refused wherever it would broadcast without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Batch, StageContext, VelocityField
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.alpha_flow import AlphaFlowShortcut
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.shortcuts.imf import ImprovedMeanFlowShortcut
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut
from flowanchor.plugins.objectives.shortcuts.scm import SCMShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.flow import FlowSampler
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.plugins.teachers.student import SelfVelocity

WRONG = {
    "float32 and of shape (4, 1, 2, 2)": lambda out: out[:, :1] * 1,
    "float32 and of shape (1, 3, 2, 2)": lambda out: out.mean(0, keepdim=True),
    "float32 and of shape (4, 3, 2)": lambda out: out.mean(-1),
    "float32 and of shape (4, 3, 2, 1)": lambda out: out.mean(-1, keepdim=True),
    "float32 and of shape ()": lambda out: out.mean(),
    "complex64 and of shape (4, 3, 2, 2)": lambda out: torch.complex(out, out),
    "int64 and of shape (4, 3, 2, 2)": lambda out: (10 * out).long(),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        return torch.tanh(self.layer(tokens) + context.carried[0])


class Headed(Backbone):
    """Images [B, 3, 2, 2] with a head that returns whatever `ending` makes of them."""

    takes_end_time = True

    def __init__(self, ending: Any) -> None:
        super().__init__()
        self.sample_shape, self.ending = (3, 2, 2), ending
        self.conditioning = Classes(9, dropout=0.1)
        self.blocks = nn.ModuleList([Layer()])

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        return x * 1, StageContext(((t if r is None else t + 0.1 * r).view(-1, 1, 1, 1),))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        return self.ending(tokens)


def facm(anchor: Any = None, shortcut: Any = None, interval: Any = None) -> ComposedObjective:
    return ComposedObjective(interval or AuxiliaryInterval(), Uniform(), anchor, shortcut)


OBJECTIVES = {
    "flow": lambda: facm(FlowMatchingAnchor(cosine_weight=0)),
    "shortcut": lambda: facm(None, ConsistencyShortcut(), ExpandedInterval()),
    "facm": lambda: facm(FlowMatchingAnchor(), ConsistencyShortcut(), ExpandedInterval()),
    "facm without cosine": lambda: facm(FlowMatchingAnchor(cosine_weight=0), ConsistencyShortcut()),
    "scm": lambda: facm(None, SCMShortcut()),
    "meanflow": lambda: facm(None, MeanFlowShortcut()),
    "imf": lambda: facm(None, ImprovedMeanFlowShortcut()),
    "alpha_flow": lambda: facm(None, AlphaFlowShortcut()),
}
BATCH = Batch(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("engine", [Chain(), Chain(False), TwoPass(), Full(), FiniteDifference()], ids=repr)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_head_of_another_shape_is_named(objective, engine):
    for found, ending in WRONG.items():
        with pytest.raises(ConfigError) as refusal:
            OBJECTIVES[objective]()(Headed(ending), BATCH, DataVelocity(), engine)
        assert str(refusal.value) == (
            f"Headed returned numbers of type {found} for samples of shape (4, 3, 2, 2): let its last layer (a "
            "Backbone's head) return floating-point numbers of the samples' own shape."
        )
    with pytest.raises(ConfigError, match="returned .*[Tt]uple|returned .*Tensor, Tensor"):
        OBJECTIVES[objective]()(Headed(lambda out: (out, out)), BATCH, DataVelocity(), engine)
    assert OBJECTIVES[objective]()(Headed(lambda out: out * 2), BATCH, DataVelocity(), engine).loss.isfinite()


class Narrow(VelocityField):
    def forward(self, x, t, cond, flow, student, interval):
        return flow[:, :1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_teacher_of_another_shape_is_named(objective):
    with pytest.raises(ConfigError, match=r"^Narrow returned numbers of type float32 and of shape \(4, 1, 2, 2\)"):
        OBJECTIVES[objective]()(Headed(lambda out: out * 2), BATCH, Narrow(), Chain())
    for scale in (1.0, 2.0):
        for found, ending in WRONG.items():
            teacher = CheckpointVelocity.of_network(Headed(ending), Guidance(scale))
            with pytest.raises(ConfigError) as refusal:
                OBJECTIVES[objective]()(Headed(lambda out: out * 2), BATCH, teacher, Chain())
            assert str(refusal.value).startswith(f"Headed returned numbers of type {found} for samples of shape")


@pytest.mark.parametrize("found", WRONG)
def test_the_student_as_its_own_teacher(found):
    with pytest.raises(ConfigError, match="^Headed returned numbers of type"):
        SelfVelocity(mix=0.1)(
            BATCH.x1, torch.full((4,), 0.5), BATCH.cond, BATCH.x1, Headed(WRONG[found]), ExpandedInterval()
        )


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "sampler",
    [
        lambda scale: FlowSampler(2, guidance_scale=scale), lambda scale: FlowSampler(2, "heun", guidance_scale=scale),
        lambda scale: FlowSampler(2, "midpoint", guidance_scale=scale),
        lambda scale: FlowSampler(2, "dopri5", guidance_scale=scale),
        lambda scale: ConsistencySampler(2, guidance_scale=scale),
        lambda scale: MeanFlowSampler(2, guidance_scale=scale),
    ],
)  # fmt: skip
def test_samplers_do_not_broadcast(sampler, scale):
    for found, ending in WRONG.items():
        with pytest.raises(ConfigError) as refusal:
            sampler(scale).sample(Headed(ending), BATCH.x1, BATCH.cond, AuxiliaryInterval())
        assert str(refusal.value).startswith(f"Headed returned numbers of type {found} for samples of shape")
    drawn = sampler(scale).sample(Headed(lambda out: out * 2), BATCH.x1, BATCH.cond, AuxiliaryInterval())
    assert drawn.shape == BATCH.x1.shape
