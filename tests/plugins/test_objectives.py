"""The mathematics of intervals, times, anchors, shortcuts and their composition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Batch, Point, Shortcut, StageContext, TermResult
from flowanchor.jvp import Full
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.arctan_lognormal import ArctanLogNormal
from flowanchor.plugins.objectives.times.logit_normal import LogitNormal
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.testing import Answers


class Spy(Backbone):
    """F(x, t, r) = a x + b t (+ c r), which records the times that it is told."""

    def __init__(self, takes_end_time: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v)) for v in (0.3, 0.7, 0.2))
        self.blocks = nn.ModuleList()
        self.sample_shape = (2, 3, 3)
        self.takes_end_time = takes_end_time
        self.told: list[tuple] = []

    def embed(self, x, t, cond, r=None):
        self.told.append(
            (torch.as_tensor(t).detach().clone() if not torch._C._functorch.is_gradtrackingtensor(t) else None, r)
        )
        return self.a * x, StageContext((t,), (r,))

    def head(self, tokens, context):
        out = tokens + self.b * context.carried[0].view(-1, 1, 1, 1)
        return out if context.fixed[0] is None else out + self.c * context.fixed[0].view(-1, 1, 1, 1)


def batch_of(size=4):
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randn(size, 2, 3, 3, generator=generator)
    noise = torch.randn(size, 2, 3, 3, generator=generator)
    return Batch(x1, torch.zeros(size, dtype=torch.long)), noise, torch.linspace(0.1, 0.9, size)


# ------------------------------------------------------------------------------------------------- intervals


def test_intervals_tell_the_branches_apart():
    t = torch.tensor([0.2, 0.7])
    assert torch.equal(ExpandedInterval().shortcut(t).t, t) and ExpandedInterval().shortcut(t).r is None
    assert torch.allclose(ExpandedInterval().anchor(t).t, torch.tensor([1.8, 1.3]))
    assert torch.allclose(ExpandedInterval().pretraining(t).t, torch.tensor([0.2, 1.3]))
    assert torch.equal(AuxiliaryInterval().shortcut(t).r, torch.ones(2))
    assert torch.equal(AuxiliaryInterval().shortcut(t, end=t + 0.1).r, t + 0.1)
    assert torch.equal(AuxiliaryInterval().anchor(t).r, t)
    assert PlainInterval().anchor(t) == PlainInterval().shortcut(t)


def test_auxiliary_interval_needs_its_embedder():
    with pytest.raises(ConfigError, match="auxiliary_time_cond=true"):
        AuxiliaryInterval().check(Spy(takes_end_time=False))
    AuxiliaryInterval().check(Spy(takes_end_time=True))


@pytest.mark.parametrize("distribution", [ArctanLogNormal(), LogitNormal(), Uniform()], ids=lambda d: type(d).__name__)
def test_times_lie_in_the_unit_interval(distribution):
    torch.manual_seed(0)
    t = distribution.sample(10_000)
    assert t.shape == (10_000,) and t.dtype == torch.float32
    assert 0 <= t.min() and t.max() <= 1 and t.std() > 0.1


def test_median_times():
    zero = torch.zeros(1)
    assert ArctanLogNormal(mean=0.0).from_draw(zero).item() == pytest.approx(0.5)
    assert ArctanLogNormal().from_draw(zero).item() == pytest.approx(1 - 2 / math.pi * math.atan(math.exp(-0.8)))
    assert LogitNormal().from_draw(zero).item() == pytest.approx(1 / (1 + math.exp(-0.8)))


# ---------------------------------------------------------------------------------------------------- anchor


def test_anchor_is_mean_squared_error_plus_direction():
    prediction, velocity = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    term = FlowMatchingAnchor().loss(prediction, velocity, torch.rand(3))
    mse = ((prediction - velocity) ** 2).mean(dim=(1, 2, 3))
    dot = (prediction * velocity).sum(1) / (prediction.norm(dim=1) * velocity.norm(dim=1))
    assert torch.allclose(term.loss, mse + (1 - dot).mean(dim=(1, 2)), atol=1e-6)


def test_cosine_of_one_channel_is_taken_over_the_sample():
    prediction, velocity = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    auto = FlowMatchingAnchor().loss(prediction, velocity, torch.rand(3)).parts["cosine"]
    whole = FlowMatchingAnchor(cosine="sample").loss(prediction, velocity, torch.rand(3)).parts["cosine"]
    sign = FlowMatchingAnchor(cosine="channel").loss(prediction, velocity, torch.rand(3)).parts["cosine"]
    assert torch.equal(auto, whole) and not torch.allclose(auto, sign)
    assert "cosine" not in FlowMatchingAnchor(cosine="off").loss(prediction, velocity, torch.rand(3)).parts
    with pytest.raises(ConfigError, match="choose auto, channel, sample or off"):
        FlowMatchingAnchor(cosine="angle")


# -------------------------------------------------------------------------------------------------- shortcut


def shortcut_by_hand(prediction, tangent, velocity, t, p=0.5, clamp=1.0, power=0.5, epsilon=1e-3):
    losses = []
    for f, df, v, time in zip(prediction.double(), tangent.double(), velocity.double(), t.double(), strict=True):
        g = (f - (v + (1 - time) * df)).clamp(-clamp, clamp)
        target = f - (1 - time**p) * g
        error = ((f - target) ** 2).mean()
        losses.append(torch.cos(math.pi * time / 2) * error / (error + epsilon) ** power)
    return torch.stack(losses)


def loss_of(shortcut, prediction, tangent, velocity, t):
    return shortcut.loss(Answers(prediction, tangent), Point(velocity, t, torch.ones_like(t), velocity))


def test_consistency_by_hand():
    prediction, tangent, velocity = (torch.randn(5, 2, 3, 3) for _ in range(3))
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    term = loss_of(ConsistencyShortcut(), prediction, tangent, velocity, t)
    assert torch.allclose(term.loss.double(), shortcut_by_hand(prediction, tangent, velocity, t), atol=1e-6)
    residual = prediction - (velocity + (1 - t.view(-1, 1, 1, 1)) * tangent)
    assert term.diagnostics["clamp_share"].item() == pytest.approx((residual.abs() > 1).float().mean().item())


def test_every_constant_of_the_shortcut_matters():
    prediction, tangent, velocity = (torch.randn(5, 2, 3, 3) for _ in range(3))
    t = torch.linspace(0.1, 0.8, 5)
    base = loss_of(ConsistencyShortcut(), prediction, tangent, velocity, t).loss
    for change in (
        {"relaxation_exponent": 1.0}, {"relaxation_exponent": None}, {"clamp": 0.5}, {"clamp": None},
        {"weight_power": 1.0}, {"weight_epsilon": 0.1}, {"time_weight": False},
    ):  # fmt: skip
        assert not torch.allclose(
            base, loss_of(ConsistencyShortcut(**change), prediction, tangent, velocity, t).loss
        ), change


def test_the_shortcut_is_at_rest_on_a_straight_flow():
    """F = v with dF/dt = 0 solves the identity F = v + (1 - t) dF/dt."""
    velocity = torch.randn(4, 2, 3, 3)
    term = loss_of(
        ConsistencyShortcut(), velocity.clone().requires_grad_(), torch.zeros_like(velocity), velocity, torch.rand(4)
    )
    assert term.loss.abs().max() == 0


# -------------------------------------------------------------------------------------------------- objective


def facm(interval=None, **kwargs):
    return ComposedObjective(
        interval or ExpandedInterval(), ArctanLogNormal(), FlowMatchingAnchor(), ConsistencyShortcut(), **kwargs
    )


def test_objective_is_a_pure_function_of_data_noise_and_time():
    batch, noise, t = batch_of()
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(facm()(Spy(), batch, DataVelocity(), Full(), noise, t).loss)
    assert torch.equal(*losses)
    torch.manual_seed(1)
    drawn = facm()(Spy(), batch, DataVelocity(), Full()).loss
    assert not torch.equal(drawn, losses[0])


def test_facm_by_hand_on_a_linear_network():
    batch, noise, t = batch_of()
    result = facm()(Spy(), batch, DataVelocity(), Full(), noise, t)
    times = t.view(-1, 1, 1, 1)
    x_t, v = (1 - times) * noise + times * batch.x1, batch.x1 - noise
    at_anchor, at_shortcut, tangent = 0.3 * x_t + 0.7 * (2 - times), 0.3 * x_t + 0.7 * times, 0.3 * v + 0.7
    anchor = FlowMatchingAnchor().loss(at_anchor, v, t).loss.mean()
    assert torch.allclose(result.terms["anchor"], anchor, atol=1e-6)
    assert torch.allclose(result.prediction, at_shortcut, atol=1e-6)
    assert torch.allclose(result.tangent, tangent, atol=1e-6)
    assert torch.allclose(
        result.terms["shortcut"], shortcut_by_hand(at_shortcut, tangent, v, t).mean().float(), atol=1e-6
    )
    assert torch.allclose(result.loss, result.terms["anchor"] + result.terms["shortcut"])
    assert result.diagnostics["tangent_norm"].item() == pytest.approx(
        tangent.flatten(1).norm(dim=1).mean().item(), rel=1e-5
    )


def test_anchor_is_told_the_reflected_time():
    """Fails if the anchor were conditioned on t."""
    batch, noise, t = batch_of()
    spy = Spy()
    ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor())(spy, batch, DataVelocity(), Full(), noise, t)
    assert torch.equal(spy.told[0][0], 2 - t) and not torch.equal(spy.told[0][0], t)
    plain = Spy()
    ComposedObjective(PlainInterval(), Uniform(), FlowMatchingAnchor())(plain, batch, DataVelocity(), Full(), noise, t)
    assert torch.equal(plain.told[0][0], t)


def test_auxiliary_interval_tells_both_branches_r():
    batch, noise, t = batch_of()
    spy = Spy(takes_end_time=True)
    facm(AuxiliaryInterval())(spy, batch, DataVelocity(), Full(), noise, t)
    assert torch.equal(spy.told[0][1], t), "anchor: r = t"
    assert torch.equal(spy.told[1][1], torch.ones_like(t)), "shortcut: r = 1"


def test_stage_one_trains_both_halves():
    batch, noise, t = batch_of()
    spy = Spy()
    objective = ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(branch="pretraining"))
    assert objective.kind == "flow"
    objective(spy, batch, DataVelocity(), Full(), noise, t)
    assert torch.equal(spy.told[0][0], torch.cat([t[:2], 2 - t[2:]]))


def test_no_gradient_leaks_through_the_tangent():
    """The gradient equals that of the same loss with the tangent as a constant."""
    batch, noise, t = batch_of()
    batch, noise, t = Batch(batch.x1.double(), batch.cond), noise.double(), t.double()
    network = LightningDiT(3, 1, 2, 16, 2, 2, num_classes=3, class_dropout_prob=0.0).double()
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    objective = ComposedObjective(ExpandedInterval(), Uniform(), None, ConsistencyShortcut())
    result = objective(network, batch, DataVelocity(), Full(), noise, t)
    assert not result.tangent.requires_grad
    result.loss.backward()
    ours = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    times = t.view(-1, 1, 1, 1)
    prediction = network.predict((1 - times) * noise + times * batch.x1, t, batch.cond)
    loss_of(ConsistencyShortcut(), prediction, result.tangent, result.velocity, t).loss.mean().backward()
    theirs = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-8 * gradient.norm() + 1e-14, name


def test_dropped_labels_are_the_same_for_every_branch():
    seen = []

    class Labelled(Spy):
        def embed(self, x, t, cond, r=None):
            seen.append(cond.clone())
            return super().embed(x, t, cond, r)

    network = Labelled()
    network.conditioning = Classes(9, dropout=0.5)
    batch, noise, t = batch_of(16)
    facm()(network.train(), batch, DataVelocity(), Full(), noise, t)
    assert torch.equal(seen[0], seen[1]) and 0 < (seen[0] == 9).sum() < 16
    seen.clear()
    facm()(network.eval(), batch, DataVelocity(), Full(), noise, t)
    assert (seen[0] == 0).all()


def test_weights_and_missing_terms():
    batch, noise, t = batch_of()
    base = facm()(Spy(), batch, DataVelocity(), Full(), noise, t)
    weighted = facm(anchor_weight=2.0, shortcut_weight=0.5)(Spy(), batch, DataVelocity(), Full(), noise, t)
    assert torch.allclose(weighted.loss, 2 * base.terms["anchor"] + 0.5 * base.terms["shortcut"])
    alone = ComposedObjective(ExpandedInterval(), Uniform(), {}, ConsistencyShortcut())  # objective/anchor=none
    assert set(alone(Spy(), batch, DataVelocity(), Full(), noise, t).terms) == {"shortcut"}
    with pytest.raises(ConfigError, match="neither anchor nor shortcut"):
        ComposedObjective(ExpandedInterval(), Uniform(), {}, {})
    with pytest.raises(ConfigError, match="does not have"):
        ComposedObjective(ExpandedInterval(), Uniform(), None, ConsistencyShortcut(), anchor_weight=0.5).check(Spy())


def test_the_anchor_warms_up_alone_on_both_halves():
    batch, noise, t = batch_of()
    spy = Spy()
    objective = ComposedObjective(
        ExpandedInterval(), Uniform(), FlowMatchingAnchor(), ConsistencyShortcut(), anchor_warmup_steps=3
    )
    alone = ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(branch="pretraining"))
    objective.at_step(2)
    warm = objective(spy, batch, DataVelocity(), Full(), noise, t)
    assert set(warm.terms) == {"anchor"} and warm.tangent is None
    torch.testing.assert_close(spy.told[-1][0], torch.cat([t[:2], 2 - t[2:]]))
    torch.testing.assert_close(warm.loss, alone(spy, batch, DataVelocity(), Full(), noise, t).loss)
    objective.at_step(3)
    assert set(objective(spy, batch, DataVelocity(), Full(), noise, t).terms) == {"anchor", "shortcut"}
    with pytest.raises(ConfigError, match="needs an anchor"):
        ComposedObjective(ExpandedInterval(), Uniform(), None, ConsistencyShortcut(), anchor_warmup_steps=3).check(spy)


def test_the_anchor_is_asked_with_the_first_question_that_carries_gradient():
    """In one call of the engine, so that it can be one walk; and never where its gradient would be lost."""
    batch, noise, t = batch_of()
    calls = []

    class Asking(Shortcut):
        def loss(self, ask, point):
            x, t, end, v = point
            ask.fixed(x, t, t)
            with torch.no_grad():
                ask(x, t, end)
            prediction, _ = ask.along(v, x, t, end)
            ask(x + 1, t, end)
            return TermResult(self.weight(prediction.square().flatten(1).mean(1), t))

    def engine(network, x, cond, questions):
        calls.append([(bool(torch.equal(q.t, 2 - t)), q.along is not None) for q in questions])
        return Full()(network, x, cond, questions)

    objective = ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), Asking())
    spy = Spy()
    assert objective(spy, batch, DataVelocity(), engine, noise, t).loss.requires_grad
    anchor, plain, moving = (True, False), (False, False), (False, True)
    assert calls == [[anchor], [plain], [anchor, moving], [plain]]  # the first: F(x, t, t), told as the anchor is


def test_the_cosine_from_nothing_is_steep_finite_and_gone_when_clipped():
    """By hand: the gradient at F = 0 is -v / (|v| 1e-8), over the places; clipped, it is one step along v."""
    anchor = FlowMatchingAnchor(cosine="channel")
    velocity = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    prediction = torch.zeros_like(velocity, requires_grad=True)
    anchor.loss(prediction, velocity, torch.rand(1)).loss.sum().backward()
    direction = velocity / velocity.norm(dim=1, keepdim=True)
    expected = -direction * 1e8 / 4 - 2 * velocity / velocity.numel()
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-9, atol=0)
    torch.nn.utils.clip_grad_norm_([prediction], 1.0)
    torch.testing.assert_close(prediction.grad, -direction / 2, rtol=1e-6, atol=1e-7)  # four places of length 1


@pytest.mark.parametrize(("beta", "steps"), [(0.95, 640), (0.99, 3100)])
def test_without_clipping_adam_remembers_the_first_step(beta, steps):
    """What docs/objectives.md says of a parameter whose gradient is 1e8 once and 1 from then on."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, beta), weight_decay=0.0)
    slow = 0
    for step in range(2 * steps):
        before, parameter.grad = parameter.item(), torch.full_like(parameter, 1e8 if step == 0 else 1.0)
        optimizer.step()
        slow += step > 9 and before - parameter.item() < 0.5  # the first mean is forgotten by then
    assert slow + 9 == pytest.approx(steps, rel=0.02)
