"""Anchor, shortcut, interval and weight combine freely: each legal combination trains, each illegal one is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError
from flowanchor.generation.samplers import check_sampler
from flowanchor.interfaces import Batch, Point
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.objectives.shortcuts.alpha_flow import AlphaFlowShortcut
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.shortcuts.imf import ImprovedMeanFlowShortcut
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut
from flowanchor.plugins.objectives.shortcuts.scm import SCMShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.objectives.weights.log_variance import LogVarianceWeight
from flowanchor.plugins.objectives.weights.none import NoWeight
from flowanchor.plugins.objectives.weights.power import PowerWeight
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.testing import Answers

CONF = Path(__file__).parents[2] / "conf"
INTERVALS = {"expanded": ExpandedInterval, "auxiliary": AuxiliaryInterval, "plain": PlainInterval}
SHORTCUTS = {
    "consistency": ConsistencyShortcut, "meanflow": MeanFlowShortcut, "imf": ImprovedMeanFlowShortcut,
    "alpha_flow": AlphaFlowShortcut, "scm": lambda: SCMShortcut(warmup_steps=10), "none": lambda: None,
}  # fmt: skip
ANCHORS = {"flow_matching": FlowMatchingAnchor, "none": lambda: None}
WEIGHTS = {"shortcut": lambda: None, "power": PowerWeight, "log_variance": LogVarianceWeight, "none": NoWeight}
AVERAGES = ("meanflow", "imf", "alpha_flow")  # of any length
COMBINATIONS = list(itertools.product(INTERVALS, SHORTCUTS, ANCHORS, WEIGHTS))


def refused(interval: str, shortcut: str, anchor: str, weight: str) -> str | None:
    """Why a combination is illegal, None where it is not: the rule, written down apart from the code."""
    if shortcut == anchor == "none":
        return "neither anchor nor shortcut"
    if shortcut == "none" and weight != "shortcut":
        return "has no shortcut"
    if shortcut in AVERAGES and interval == "plain":
        return "choose objective/interval=auxiliary .* or objective/interval=expanded"
    return None


def network(interval: str, seed: int = 1, depth: int = 2) -> LightningDiT:
    torch.manual_seed(seed)
    backbone = LightningDiT(
        input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=depth, num_heads=2, num_classes=3,
        auxiliary_time_cond=interval == "auxiliary", disable_label_dropout=True, use_swiglu=True, use_rmsnorm=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return backbone


def build(interval: str, shortcut: str, anchor: str, weight: str) -> ComposedObjective:
    return ComposedObjective(
        INTERVALS[interval](), Uniform(), ANCHORS[anchor](), SHORTCUTS[shortcut](), weight=WEIGHTS[weight]()
    )


def batch() -> Batch:
    torch.manual_seed(3)
    return Batch(torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize("interval, shortcut, anchor, weight", COMBINATIONS)
def test_each_combination_trains_or_is_refused(interval, shortcut, anchor, weight):
    why = refused(interval, shortcut, anchor, weight)
    backbone = network(interval, depth=1)
    if why is not None:
        with pytest.raises(ConfigError, match=why):
            build(interval, shortcut, anchor, weight).check(backbone)
        return
    objective = build(interval, shortcut, anchor, weight)
    objective.check(backbone)
    parameters = [*backbone.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=1e-3)
    before = [p.detach().clone() for p in parameters]
    objective.at_step(5)
    result = objective(backbone, batch(), DataVelocity(), Chain())
    result.loss.backward()
    optimizer.step()
    assert math.isfinite(float(result.loss.detach()))
    assert set(result.terms) == {n for n, c in (("anchor", anchor), ("shortcut", shortcut)) if c != "none"}
    moved = [not torch.equal(a, b.detach()) for a, b in zip(before, parameters, strict=True) if b.requires_grad]
    assert sum(moved) > 0.8 * len(moved)
    if weight == "log_variance":
        assert objective.shortcut.weight.linear.weight.abs().sum() > 0


@pytest.mark.parametrize("shortcut", [name for name in SHORTCUTS if name != "none"])
@pytest.mark.parametrize("interval", ["expanded", "auxiliary"])
def test_every_engine_gives_the_same_loss_and_gradients(interval, shortcut):
    found = {}
    engines = {"full": Full(), "chain": Chain(), "two_pass": TwoPass(), "finite_difference": FiniteDifference()}
    for name, engine in engines.items():
        for anchor in ("none", "flow_matching"):
            backbone, objective = network(interval).double(), build(interval, shortcut, anchor, "shortcut")
            objective.at_step(2000)  # alpha-Flow's tangent has taken over
            x1, cond = batch()
            torch.manual_seed(7)
            times = objective.draw(6)
            noise = torch.randn(x1.shape, dtype=torch.float64)
            given = [None if v is None else v.double() for v in times]
            result = objective(backbone, Batch(x1.double(), cond), DataVelocity(), engine, noise, *given)
            result.loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])
            found[name, anchor] = (result.loss.detach(), gradients)
    for (name, anchor), (loss, gradients) in found.items():
        wanted, exact = found["full", anchor], name != "finite_difference"
        assert abs(loss - wanted[0]) <= (1e-10 if exact else 1e-4) * abs(wanted[0])
        assert (gradients - wanted[1]).norm() <= (1e-9 if exact else 1e-4) * wanted[1].norm()


# ---------------------------------------------------------------------------------------------------- what they mean


def test_times_of_meanflow():
    """A share has r = t; the others r > t, and 1 where the interval knows no other end."""
    torch.manual_seed(0)
    first, second, coin = torch.rand(3, 4000)
    t, end = MeanFlowShortcut(share=0.75).times(first, second, coin, AuxiliaryInterval())
    assert bool((end >= t).all()) and abs(float((end == t).float().mean()) - 0.75) < 0.03
    assert torch.equal(t, torch.minimum(first, second))
    t, end = MeanFlowShortcut(share=0.25).times(first, second, coin, ExpandedInterval())
    assert set(end[end != t].tolist()) == {1.0} and abs(float((end == t).float().mean()) - 0.25) < 0.03
    told = ExpandedInterval().shortcut(t, end).t
    assert torch.equal(told, torch.where(end == t, 2 - t, t))


def test_with_r_equal_to_t_meanflow_is_flow_matching():
    backbone, objective = network("auxiliary"), build("auxiliary", "meanflow", "none", "none")
    x1, cond = batch()
    t = torch.linspace(0.1, 0.9, 6)
    noise = torch.randn_like(x1)
    result = objective(backbone, Batch(x1, cond), DataVelocity(), Chain(), noise, t, t)
    times = t.view(-1, 1, 1, 1)
    plain = backbone.predict((1 - times) * noise + times * x1, t, cond, t)
    torch.testing.assert_close(result.loss, (plain - (x1 - noise)).square().mean())


@pytest.mark.parametrize("engine", [Chain(), Full(), TwoPass(), FiniteDifference(1e-4, torch.float64)], ids=repr)
def test_a_span_shrinks_as_time_goes_on(engine):
    """Told r - t, the total derivative with the end held is that of F(x, t, r - t): against differences."""
    backbone = network("auxiliary").double()
    objective = ComposedObjective(AuxiliaryInterval("span"), Uniform(), shortcut=MeanFlowShortcut())
    x1, cond = batch()
    x1, noise = x1.double(), torch.randn(x1.shape, dtype=torch.float64)
    t, end = torch.linspace(0.1, 0.6, 6).double(), torch.linspace(0.5, 0.9, 6).double()
    result = objective(backbone, Batch(x1, cond), DataVelocity(), engine, noise, t, end)

    def at(step):
        moved = (t + step).view(-1, 1, 1, 1)
        return backbone.predict((1 - moved) * noise + moved * x1, t + step, cond, end - t - step)

    torch.testing.assert_close(result.prediction, at(0.0).detach())
    difference = ((at(1e-5) - at(-1e-5)) / 2e-5).detach()
    torch.testing.assert_close(result.tangent, difference, rtol=1e-5, atol=1e-7)
    told = AuxiliaryInterval("span").anchor(t)
    assert told.r.abs().max() == 0 and AuxiliaryInterval("span").shortcut(t).r.equal(1 - t)
    with pytest.raises(ConfigError, match="choose end or span"):
        AuxiliaryInterval("length")


def test_meanflow_drops_conditions_among_instants():
    """A share of the whole batch, and none of a sample that has an interval: its target is guided."""
    torch.manual_seed(0)
    kind = Classes(10, dropout=0.1)
    labels = torch.zeros(40_000, dtype=torch.long)
    instants = torch.rand(40_000) < 0.25
    dropped = kind.dropped(labels, instants) == 10
    assert not dropped[~instants].any() and float(dropped.float().mean()) == pytest.approx(0.1, abs=0.01)
    few = torch.arange(40_000) < 100
    assert (kind.dropped(labels, few) == 10).equal(few)  # 10 % of the batch are more than there are
    seen = []

    class Watched(Classes):
        def dropped(self, cond, among=None):
            seen.append(among)
            return cond

    backbone = network("auxiliary").train()
    backbone.conditioning = Watched(3, dropout=0.1)
    t, end = torch.linspace(0.1, 0.6, 6), torch.tensor([0.1, 0.9, 0.3, 0.9, 0.9, 0.9])
    for shortcut in (MeanFlowShortcut(), ConsistencyShortcut()):
        objective = ComposedObjective(AuxiliaryInterval(), Uniform(), shortcut=shortcut)
        objective(backbone, batch(), DataVelocity(), Full(), None, t, end)
    assert seen[0].tolist() == [True, False, True, False, False, False] and seen[1] is None


def test_alpha_flow_goes_from_flow_matching_to_meanflow():
    backbone, shortcut = network("auxiliary").double(), AlphaFlowShortcut(start=0, end=1000)
    objective = ComposedObjective(AuxiliaryInterval(), Uniform(), shortcut=shortcut, weight=NoWeight())
    mean = ComposedObjective(AuxiliaryInterval(), Uniform(), shortcut=MeanFlowShortcut(), weight=NoWeight())
    x1, cond = batch()
    x1, noise = x1.double(), torch.randn(x1.shape, dtype=torch.float64)
    t, end = torch.linspace(0.1, 0.6, 6).double(), torch.linspace(0.5, 0.9, 6).double()

    def gradient(which, step):
        backbone.zero_grad()
        which.at_step(step)
        which(backbone, Batch(x1, cond), DataVelocity(), Chain(), noise, t, end).loss.backward()
        return torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])

    alphas = []
    for step in (0, 300, 500, 700, 1000):
        objective.at_step(step)
        alphas.append(shortcut.alpha(step))
    assert alphas == sorted(alphas, reverse=True) and alphas[0] == 1 and alphas[2] == 0.5 and alphas[-1] == 0
    target = gradient(mean, 0)
    assert torch.equal(gradient(objective, 1000), target)
    near = []
    for step in (500, 600, 690):
        scaled = gradient(objective, step) / shortcut.alpha(step) ** 2  # an error of order alpha, times alpha
        near.append(float((scaled - target).norm() / target.norm()))
    assert near[0] > near[1] > near[2] and near[2] < 0.05  # at a small alpha it is MeanFlow's to first order


@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.01, 0.0])
def test_rows_of_alpha_flow_by_hand(alpha):
    """Loss and gradient of each row; those with r = t are MeanFlow's at every alpha."""
    shortcut = AlphaFlowShortcut()
    shortcut.now.set(alpha)
    shortcut.doing = "flow" if alpha == 1 else "discrete" if alpha > 0 else "tangent"
    draw = torch.Generator().manual_seed(0)
    prediction, tangent, velocity, x, opinion = torch.randn(5, 4, 2, 3, 3, dtype=torch.float64, generator=draw)
    prediction.requires_grad_()
    opinion[1, 0, 0, 0] = 9.0
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    r = torch.tensor([0.2, 0.9, 0.6, 1.0], dtype=torch.float64)
    asked = []

    class Asked(Answers):
        def fixed(self, x, t, end):
            asked.append((x, t, end))
            return opinion

    loss = shortcut.loss(Asked(prediction, tangent), Point(x, t, r, velocity)).loss
    means = MeanFlowShortcut().loss(Answers(prediction, tangent), Point(x, t, r, velocity)).loss
    if 0 < alpha < 1:
        ((point, s, end),) = asked
        torch.testing.assert_close(s, torch.tensor([0.2, 0.4 + 0.5 * alpha, 0.6, 0.8 + 0.2 * alpha]).double())
        torch.testing.assert_close(point[3], x[3] + 0.2 * alpha * velocity[3])
        assert torch.equal(end, r)
    else:
        assert not asked
    for row in range(4):
        instant = row in (0, 2)
        if instant or alpha == 1:
            target, factor = velocity[row], 1.0
        elif alpha == 0:
            target, factor = velocity[row] + (r - t)[row] * tangent[row], 1.0
        else:
            target = (alpha * velocity[row] + (1 - alpha) * opinion[row]).clamp(-4, 4)
            factor = alpha
        difference = prediction[row].detach() - target
        error = difference.square().mean()
        torch.testing.assert_close(loss[row].detach(), factor * error / (error + 1e-3))
        (gradient,) = torch.autograd.grad(loss[row], prediction, retain_graph=True)
        torch.testing.assert_close(gradient[row], factor * 2 * difference / 18 / (error + 1e-3))
        if instant:
            assert torch.equal(loss[row], means[row])
    if alpha == 0.01:
        assert opinion.abs().max() > 4.1  # the bound was reached


def test_the_gradient_of_a_nearly_solved_row_stays_small():
    """(F - v)^2 = 1 and F(x_s) = F at alpha = 0.01: 2 alpha^2 / (alpha^2 + eps) of the row's share, not 2 / alpha."""
    shortcut = AlphaFlowShortcut()
    shortcut.now.set(0.01)
    shortcut.doing = "discrete"
    prediction = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    velocity = torch.zeros_like(prediction)
    t, r = torch.tensor([0.2, 0.2]).double(), torch.tensor([0.2, 0.8]).double()
    answers = Answers(prediction, velocity, fixed=prediction.detach())
    loss = shortcut.loss(answers, Point(velocity, t, r, velocity)).loss
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    instant, discrete = gradient.flatten(1).sum(1).tolist()
    assert instant == pytest.approx(2 / 1.001) and discrete == pytest.approx(2e-4 / (1e-4 + 1e-3))


def test_alpha_falls_over_a_share_of_the_run():
    shortcut = AlphaFlowShortcut(start=0.5, end=0.83, run_steps=1000)
    assert [shortcut.alpha(step) for step in (0, 500, 830, 1000)] == [1, 1, 0, 0]
    assert shortcut.alpha(665) == pytest.approx(0.5)
    assert shortcut.alpha(600) == pytest.approx(1 - 1 / (1 + math.exp(-25 * (600 - 665) / 330)))
    with pytest.raises(ConfigError, match="run_steps=null"):
        AlphaFlowShortcut(start=0, end=1000, run_steps=1000)
    with pytest.raises(ConfigError, match="trainer.max_steps"):
        AlphaFlowShortcut(start=0, end=1, run_steps=-1)


def test_imf_goes_along_the_networks_own_velocity():
    backbone, objective = network("auxiliary").double(), build("auxiliary", "imf", "none", "none")
    x1, cond = batch()
    x1, noise = x1.double(), torch.randn(x1.shape, dtype=torch.float64)
    t, end = torch.full((6,), 0.3).double(), torch.full((6,), 0.8).double()
    asked = []

    def engine(network, x, cond, questions):
        asked.extend(questions)
        return Full()(network, x, cond, questions)

    result = objective(backbone, Batch(x1, cond), DataVelocity(), engine, noise, t, end)
    x_t = 0.7 * noise + 0.3 * x1
    assert [question.along is None for question in asked] == [True, False]
    torch.testing.assert_close(asked[1].along[0], backbone.predict(x_t, t, cond, t).detach())
    value = result.prediction - 0.5 * result.tangent
    torch.testing.assert_close(result.loss.detach(), (value - (x1 - noise)).square().mean())


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_scm_by_hand(norm):
    shortcut = SCMShortcut(warmup_steps=100, normalisation=0.1, norm=norm)
    shortcut.at_step(25)
    prediction, tangent, velocity = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    prediction.requires_grad_()
    t = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)
    loss = shortcut.loss(Answers(prediction, tangent), Point(velocity, t, torch.ones_like(t), velocity)).loss
    for i, time in enumerate(t.tolist()):
        g = math.cos(math.pi * time / 2) * (prediction[i] - velocity[i] - (1 - time) * 0.25 * tangent[i]).detach()
        g = g / ((g.square().mean() if norm == "rms" else g.square().sum()).sqrt() + 0.1)
        torch.testing.assert_close(loss[i].detach(), g.square().mean())
        (gradient,) = torch.autograd.grad(loss[i], prediction, retain_graph=True)
        torch.testing.assert_close(gradient[i], 2 * g / g.numel())  # the prediction is moved along -g


@pytest.mark.parametrize("warmth", [0.0, 0.3, 1.0])
def test_the_warm_up_of_rcm_is_trigflows(warmth):
    """Against its gradient in TrigFlow's own terms: `cos T sqrt(1 - w^2 sin^2 T) (G - dx/dT) + w (cos T sin T x +
    cos T sin T dG/dT)`, G the network that means the same data, differentiated by torch; ours is that over -n t."""
    x1, x0 = torch.randn(2, 3, 2, 3, 3, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    wide = t.view(-1, 1, 1, 1)

    def straight(x, t):
        t = t.view(-1, 1, 1, 1)
        return torch.sin(1.3 * x + t) + t * x.square().mean((1, 2, 3), keepdim=True)

    def turned(state, angle):
        angle = angle.view(-1, 1, 1, 1)
        cos, sin = torch.cos(angle), torch.sin(angle)
        time = cos / (cos + sin)
        x = state / (cos + sin)
        data = x + (1 - time) * straight(x, time.flatten())
        return (cos * state - data) / sin

    angle = torch.atan2(1 - t, t)
    cos, sin = torch.cos(angle).view(-1, 1, 1, 1), torch.sin(angle).view(-1, 1, 1, 1)
    state, speed = cos * x1 + sin * x0, cos * x0 - sin * x1
    answer, rate = torch.func.jvp(turned, (state, angle), (speed, torch.ones_like(angle)))
    theirs = cos * (1 - warmth**2 * sin**2).sqrt() * (answer - speed) + warmth * cos * sin * (state + rate)

    x_t, v = (1 - wide) * x0 + wide * x1, x1 - x0
    prediction, tangent = torch.func.jvp(straight, (x_t, t), (v, torch.ones_like(t)))
    shortcut = SCMShortcut(warmup_steps=100, normalisation=None, time_weight=False, warmup="rcm")
    shortcut.at_step(round(100 * warmth))
    prediction.requires_grad_()
    loss = shortcut.loss(Answers(prediction, tangent), Point(x_t, t, torch.ones_like(t), v)).loss
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    ours = gradient * prediction[0].numel() / 2  # of the mean of squares of F - sg(F) + g
    torch.testing.assert_close(ours, -theirs / ((wide.square() + (1 - wide).square()).sqrt() * wide))
    if warmth == 1:
        torch.testing.assert_close(ours, (prediction - v - (1 - wide) * tangent).detach())
    noise = shortcut.loss(Answers(prediction, tangent), Point(x_t, torch.zeros(3), torch.ones(3), v)).loss
    assert bool(noise.isfinite().all()), "also at t = 0"
    with pytest.raises(ConfigError, match="objective.shortcut.warmup=other: choose tangent or rcm"):
        SCMShortcut(warmup="other")


@pytest.mark.parametrize("power, epsilon, reduction", [(0.5, 1e-3, "mean"), (1.0, 0.01, "sum"), (1.0, 1e-3, "mean")])
def test_the_power_weight_by_hand(power, epsilon, reduction):
    """Per row, loss and gradient; with the constants as FACM, MeanFlow (and iMF), alpha-Flow publish them."""
    difference = (torch.arange(12, dtype=torch.float64).view(2, 2, 3) / 10 - 0.3).requires_grad_()
    term = PowerWeight(power, epsilon, reduction).term(difference, torch.zeros(2), torch.tensor([1.0, 0.5]))
    for row, factor in enumerate((1.0, 0.5)):
        values = [value / 10 - 0.3 for value in range(6 * row, 6 * row + 6)]
        total = sum(value * value for value in values)
        error = total if reduction == "sum" else total / 6
        weight = factor / (error + epsilon) ** power
        assert float(term.loss[row].detach()) == pytest.approx(weight * error)
        assert float(term.parts["error"][row]) == pytest.approx(total / 6)  # what is logged can be compared
        (gradient,) = torch.autograd.grad(term.loss[row], difference, retain_graph=True)
        share = 1 if reduction == "sum" else 1 / 6
        assert gradient[row].flatten().tolist() == pytest.approx([weight * 2 * value * share for value in values])


@pytest.mark.parametrize(
    "name, constants",
    [
        ("consistency", (0.5, 1e-3, "mean")),
        ("meanflow", (1.0, 0.01, "sum")),
        ("imf", (1.0, 0.01, "sum")),
        ("alpha_flow", (1.0, 1e-3, "mean")),
    ],
)
def test_every_published_weight_is_the_default(name, constants):
    settings = OmegaConf.load(CONF / "objective" / "shortcut" / f"{name}.yaml")
    assert (settings.weight_power, settings.weight_epsilon, settings.weight_reduction) == constants


def test_the_learned_weight_is_per_sample():
    weight = LogVarianceWeight(features=16).double()
    with torch.no_grad():
        weight.linear.weight.normal_()
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    error = torch.tensor([2.0, 0.5], dtype=torch.float64)
    w = weight.log_variance(t)
    assert w.shape == (2,) and w[0] != w[1]
    torch.testing.assert_close(weight(error, t), error / w.exp() + w)
    # Its minimum is at w = log(error): trained, it is the logarithm of the error.
    optimizer = torch.optim.LBFGS(weight.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = weight(error, t).sum()
        total.backward()
        return total

    optimizer.step(loss)
    torch.testing.assert_close(weight.log_variance(t).exp().detach(), error, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_the_meanflow_sampler_follows_average_velocities():
    """For the exact averages of the flow to a point, any number of steps arrives."""
    aim = torch.randn(2, 3, dtype=torch.float64)

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
            self.asked = []

        def predict(self, x, t, cond, r=None):
            self.asked.append((float(t[0]), float(r[0])))
            return (aim - x) / (1 - t[:, None])  # the flow to a point is straight: every average is this

    for steps in (1, 2, 5):
        network = Exact()
        sampler = MeanFlowSampler().with_nfe(steps)
        drawn = sampler.sample(network, torch.randn(2, 3), None, AuxiliaryInterval())
        torch.testing.assert_close(drawn, aim)
        assert network.asked == [(i / steps, (i + 1) / steps) for i in range(steps)]
        assert sampler.nfe == sampler.network_calls == steps


def test_samplers_that_do_not_fit_are_refused():
    check_sampler(MeanFlowSampler(), "shortcut", AuxiliaryInterval())
    check_sampler(ConsistencySampler(), "shortcut", AuxiliaryInterval())
    for interval in (ExpandedInterval(), PlainInterval()):
        with pytest.raises(ConfigError, match="use sampler=consistency, or train with objective/interval=auxiliary"):
            check_sampler(MeanFlowSampler(), "shortcut", interval)


def test_an_objective_that_needs_r_says_so():
    with pytest.raises(ConfigError, match="backbone.auxiliary_time_cond=true"):
        build("auxiliary", "meanflow", "none", "shortcut").check(network("expanded"))
