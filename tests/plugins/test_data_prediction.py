"""Networks that predict the data: `F = (x1_net - x_t) / clip(1 - t, 0.05, 1)`, its derivatives, and what it learns."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

import flowanchor
from flowanchor.checkpoints import initialise_student
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Batch, Question, StageContext, VelocityField
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp.chain import Chain
from flowanchor.jvp.full import Full
from flowanchor.jvp.two_pass import TwoPass
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.plugins.teachers.student import SelfVelocity
from flowanchor.programs import convert, sample, train
from flowanchor.text.base import Tokens
from flowanchor.velocity import from_data, with_sample

SMALL = {"input_size": 4, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
WAN = {
    "in_channels": 2, "height": 4, "width": 4, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24,
    "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_len": 3,
}  # fmt: skip
NETWORKS: dict[str, Any] = {
    "lightningdit": (LightningDiT, {**SMALL, "in_channels": 2, "use_rope": True, "use_swiglu": True}),
    "sit": (SiT, {**SMALL, "in_channels": 2}),
    "wan": (Wan, WAN),
}
TIMES = [0.0, 0.3, 0.93, 0.97, 1.0, 2 - 0.97, 2 - 0.93, 2 - 0.3]  # on both sides of the clip, and as the anchor's


def pair(name: str) -> tuple[Backbone, Backbone]:
    """The same weights in a network of velocities and in one of data."""
    kind, settings = NETWORKS[name]
    torch.manual_seed(0)
    plain, data = kind(**settings).double().eval(), kind(**settings, predicts="x").double().eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    data.load_state_dict(plain.state_dict())
    return plain, data


def asked(network: Backbone, times: list[float]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(len(times), *network.sample_shape, dtype=torch.float64, generator=draw)
    text = Tokens(torch.randn(len(times), 3, 6, dtype=torch.float64, generator=draw))
    return x, torch.tensor(times, dtype=torch.float64), text if isinstance(network, Wan) else torch.arange(len(x)) % 3


@pytest.mark.parametrize("name", NETWORKS)
def test_the_velocity_by_hand(name):
    plain, data = pair(name)
    x, t, cond = asked(data, TIMES)
    with torch.no_grad():
        x1, found = plain.predict(x, t, cond), data.predict(x, t, cond)
    for row, divisor in enumerate([1.0, 0.7, 0.07, 0.05, 0.05, 0.05, 0.07, 0.7]):
        torch.testing.assert_close(found[row], (x1[row] - x[row]) / divisor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_engines_agree_and_the_derivative_is_right_on_both_sides_of_the_clip(name):
    _, network = pair(name)
    x, t, cond = asked(network, TIMES[1:4] + TIMES[5:])
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rate = torch.ones_like(t)
    question = Question(t, along=(along, rate))
    answers = {
        type(engine).__name__ + str(number): engine(network, x, cond, [question])[0]
        for number, engine in enumerate((Full(), Chain(), Chain(recompute=False), TwoPass()))
    }
    gradients = {}
    for engine, answer in answers.items():
        network.zero_grad()
        answer.prediction.square().sum().backward()
        gradients[engine] = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    first, *others = answers
    for other in others:
        torch.testing.assert_close(answers[other].prediction, answers[first].prediction, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(answers[other].tangent, answers[first].tangent, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients[other], gradients[first], rtol=1e-9, atol=1e-9)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (network.predict(x + s * along, t + s * rate, cond) for s in (step, -step))
    off = (answers[first].tangent - (ahead - behind) / (2 * step)).flatten(1).norm(dim=1)
    # Wan's layers compute their sinusoids of 1,000 t in float32, which is what its difference shows.
    assert bool((off < (5e-3 if name == "wan" else 1e-7) * answers[first].tangent.flatten(1).norm(dim=1)).all())


class Exact(Backbone):
    """The end of the flow from noise N(0, 1) to data N(0, spread^2), `x1 = x spread / n(t)`, as predicted data.

    That flow is `x(t) = x(0) n(t)`, `n^2 = (1 - t)^2 + t^2 spread^2`, and its velocity `x n' / n`.
    """

    predicts = "x"
    sample_shape = (1, 2, 2)

    def __init__(self, spread: float = 0.5):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.spread = nn.Parameter(torch.tensor(spread, dtype=torch.float64))

    def embed(self, x, t, cond, r=None):
        return x, with_sample(StageContext((t,)), x, t)

    def scale(self, t):
        return ((1 - t).square() + (t * self.spread).square()).sqrt().view(-1, 1, 1, 1)

    def head(self, tokens, context):
        return from_data(tokens * self.spread / self.scale(context.carried[0]), context)


class Marginal(VelocityField):
    """The velocity of that flow."""

    def forward(self, x, t, cond, flow, student, interval):
        slope = (t - 1 + t * student.spread.detach() ** 2).view(-1, 1, 1, 1)
        return x * slope / student.scale(t).detach() ** 2


def test_the_end_of_the_flow_is_what_the_shortcut_learns():
    """Before the clip the target is the exact answer; where it holds, up to the change of the velocity until the end,
    while the product itself would leave a fraction of the answer."""
    network, field = Exact(), Marginal()
    objective = ComposedObjective(PlainInterval(), Uniform(), shortcut=ConsistencyShortcut(clamp=None))
    t = torch.tensor([0.0, 0.3, 0.9, 0.949, 0.951, 0.97, 0.995], dtype=torch.float64)
    x1, noise = torch.randn(2, 7, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = objective(network, Batch(x1), field, Full(), noise, t)
    left = (1 - t).view(-1, 1, 1, 1)
    off = result.prediction - (result.velocity + left * result.tangent)
    assert off[:4].abs().max() < 1e-12 and bool((result.tangent[4:] == 0).all())
    size = result.prediction.abs().flatten(1).amax(1)
    assert bool((off[4:].abs().flatten(1).amax(1) < 3 * (1 - t[4:]) * size[4:]).all())
    x_t = (left * noise + (1 - left) * x1)[4:]
    x_t, late = x_t, t[4:]
    true = field(x_t, late, None, x_t, network, objective.interval)
    whole = Full()(network, x_t, None, [Question(late, along=(true, torch.ones_like(late)))])[0].tangent
    biased = result.prediction[4:] - (result.velocity[4:] + left[4:] * whole)
    assert bool((biased.abs().flatten(1).amax(1) > 0.5 * size[4:]).all())


def test_the_anchor_learns_the_data():
    """Its loss is that of the data, divided by the clip."""
    _, network = pair("lightningdit")
    t = torch.tensor([0.3, 0.97, 1.0], dtype=torch.float64)
    x1, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, left = torch.arange(3), (1 - t).view(-1, 1, 1, 1)
    objective = ComposedObjective(PlainInterval(), Uniform(), anchor=FlowMatchingAnchor(cosine="off"))
    result = objective(network, Batch(x1, labels), DataVelocity(), Full(), noise, t)
    x_t, clip = left * noise + (1 - left) * x1, torch.tensor([0.7, 0.05, 0.05]).double().view(-1, 1, 1, 1)
    torch.testing.assert_close(result.velocity, (x1 - x_t) / clip)
    predicted = x_t + clip * network.predict(x_t, t, labels)
    torch.testing.assert_close(result.loss, ((predicted - x1) / clip).square().mean())


def test_what_teaches_what():
    """Velocities of a teacher become those that the student can answer; those of data are what it answers already."""
    plain, data = pair("lightningdit")
    x, t, labels = asked(data, [0.3, 0.96])
    x1, noise = x, torch.zeros_like(x)
    x_t = t.view(-1, 1, 1, 1) * x
    objective = ComposedObjective(ExpandedInterval(), Uniform(), anchor=FlowMatchingAnchor())

    def target(student, teacher):
        return objective(student, Batch(x1, labels), teacher, Full(), noise, t).velocity

    velocities, answers = (CheckpointVelocity.of_network(network, Guidance()) for network in pair("lightningdit"))
    v, share = plain.predict(x_t, t, labels).detach(), torch.tensor([1.0, 0.8]).double().view(-1, 1, 1, 1)
    torch.testing.assert_close(target(data, velocities), share * v)
    end = x_t + torch.tensor([0.7, 0.05]).double().view(-1, 1, 1, 1) * target(data, velocities)
    torch.testing.assert_close(end, x_t + (1 - t).view(-1, 1, 1, 1) * v)  # of the data that is predicted
    for student in (plain, data):
        torch.testing.assert_close(target(student, answers), data.predict(x_t, t, labels).detach())
    guided = target(data, SelfVelocity(guidance_scale=3.0, guidance_low=0.0))
    clip = torch.tensor([0.7, 0.05]).double().view(-1, 1, 1, 1)
    told = ExpandedInterval().anchor(t).t
    unconditional = x_t + clip * data.predict(x_t, told, torch.full_like(labels, 3)).detach()
    torch.testing.assert_close(x_t + clip * guided, unconditional + 3 * (x1 - unconditional))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="backbone.predicts=x: DiT has v"):
        DiT(**SMALL, in_channels=2, predicts="x")
    for kind, settings in (NETWORKS["lightningdit"], NETWORKS["wan"]):
        with pytest.raises(ConfigError, match="backbone.predicts=noise"):
            kind(**settings, predicts="noise")


def run(program, monkeypatch, *arguments: str) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"src/{program.__name__.rpartition('.')[2]}.py", *arguments])
    program.main()


def test_from_training_to_a_published_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=32"]
    more = [*small, "~callbacks.sample_grid", "logger=none"]
    data = ["backbone.predicts=x", "hydra.run.dir=run"]
    run(train, monkeypatch, *more, *data, "trainer.max_steps=1")
    run(train, monkeypatch, *more, *data, "trainer.max_steps=2")
    model = flowanchor.load("run")
    assert model.step == 2 and model.backbone.predicts == "x"
    run(sample, monkeypatch, "checkpoint=run", "num_samples=4", "seed=2", "hydra.run.dir=drawn")
    with np.load("drawn/samples.npz") as file:
        drawn = torch.from_numpy(file["images"])
    run(convert, monkeypatch, "checkpoint=run", "output=published", "format=huggingface")
    assert torch.equal(flowanchor.load("published").sample(seed=2, num_samples=4), drawn)
    taught = ["objective.anchor.cosine=off", "teacher=checkpoint", "teacher.checkpoint=run", "teacher.guidance_scale=1"]
    run(train, monkeypatch, *more, *taught, "trainer.max_steps=1", "hydra.run.dir=of_velocities")
    capsys.readouterr()
    for words, told in (
        ([convert, "checkpoint=run", "output=a.pt", "format=authors"], "predicts the data (backbone.predicts=x)"),
        ([train, *more, "initialise_from=run", "hydra.run.dir=other"], "set backbone.predicts=x, or initialise_from"),
    ):
        with pytest.raises(SystemExit):
            run(words[0], monkeypatch, *words[1:])
        assert told in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="has backbone.predicts=v, and a network of backbone.predicts=x cannot"):
        initialise_student(model.backbone, "of_velocities")
