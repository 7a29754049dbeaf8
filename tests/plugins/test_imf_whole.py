"""Improved MeanFlow whole: the formulas in the paper's own direction of time, guidance as an input, V on its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Batch, Guided, Question
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.jvp.compiled import compile_blocks
from flowanchor.plugins.backbones.imf_dit import IMFDiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.imf_whole import WholeImprovedMeanFlow
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut
from flowanchor.plugins.objectives.times.logit_normal import LogitNormal
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.testing import check_backbone, check_objective

SPAN = AuxiliaryInterval("span")


def network(**settings) -> IMFDiT:
    """A small one in float64 whose every weight matters."""
    torch.manual_seed(0)
    sizes = {"depth": 3, "head_depth": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    made = IMFDiT(**{"input_size": 4, "patch_size": 2, "in_channels": 1, **sizes, **settings}).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def given(size: int = 5):
    """A batch, its noise, times of which the first and the last are r = t, and guidance."""
    draw = torch.Generator().manual_seed(1)
    x1, noise = torch.randn(2, size, 1, 4, 4, generator=draw, dtype=torch.float64)
    t = torch.tensor([0.3, 0.2, 0.5, 0.6, 0.4], dtype=torch.float64)
    end = torch.tensor([0.3, 0.9, 0.7, 1.0, 0.4], dtype=torch.float64)
    guidance = torch.tensor(  # scale, low, high: t of the third lies outside
        [[3.0, 0, 1], [2.0, 0.1, 0.8], [6.0, 0.0, 0.45], [1.5, 0.4, 0.6], [8.0, 0, 1]], dtype=torch.float64
    )
    return Batch(x1, torch.tensor([0, 1, 2, 0, 1])), noise, t, end, guidance


def late(batch, noise, t, end, guidance):
    """The same with two rows where the clip of a network of data holds, one of them with r = t."""
    t, end = t.clone(), end.clone()
    t[3:], end[3:] = torch.tensor([0.97, 0.98]).double(), torch.tensor([1.0, 0.98]).double()
    return batch, noise, t, end, guidance


def by_the_paper(
    made: IMFDiT, dropped: tuple[int, ...] = (), of_data: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses of F and of V per row: T = 1 at noise, u and v point from data to noise, one row after another.

    `of_data`: what `made` answers is the data, and `u = (z - X) / clip(T, 0.05, 1)`.
    """
    batch, noise, t, end, guidance = late(*given()) if of_data else given()
    of_average, of_velocity = [], []
    for row in range(5):
        x, e, label = batch.x1[row : row + 1], noise[row : row + 1], batch.cond[row : row + 1]
        now, later = 1 - t[row : row + 1], 1 - end[row : row + 1]  # the paper's t and r
        w, low, high = guidance[row]
        a, b = 1 - high, 1 - low
        z, v = (1 - now) * x + now * e, e - x

        def u(z, now, h, w, a, b, y, asked):
            told = Guided(y, w.view(1), (1 - b).view(1), (1 - a).view(1), asked)
            answer = made.predict(z, 1 - now, told, h)
            return (z - answer) / (now if now > 0.05 else 0.05) if of_data else -answer

        zero, one, none = torch.zeros(1).double(), torch.ones(()).double(), torch.full_like(label, 3)
        with torch.no_grad():
            v = (z - x) / now.clamp(min=0.05) if of_data else v
            v_c = u(z, now, zero, w, zero, one, label, "velocity")
            v_u = u(z, now, zero, one, zero, one, none, "velocity")
            w_now = w if bool(a <= now) and bool(now <= b) else one
            v_g = v + (1 - 1 / w_now) * (v_c - v_u)
            direction = u(z, now, zero, w_now, zero, one, label, "velocity")
        if row in dropped:
            label, v_g = none, v
        average, slope = torch.func.jvp(
            lambda z, now, later=later, w=w, a=a, b=b, y=label: u(z, now, now - later, w, a, b, y, "average"),
            (z, now),
            (direction, torch.ones_like(now)),
        )
        slope = torch.zeros_like(slope) if of_data and now < 0.05 else slope
        compound = average + (now - later) * slope.detach()
        velocity = u(z, now, now - later, w, a, b, label, "velocity")
        for found, losses in ((compound, of_average), (velocity, of_velocity)):
            e2 = (found - v_g).square().sum()
            losses.append(e2 / (e2.detach() + 0.01))
    return of_average, of_velocity


def objective(**settings) -> WholeImprovedMeanFlow:
    return WholeImprovedMeanFlow(SPAN, LogitNormal(0.4, 1.0), **settings)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "dropping"])
def test_the_loss_is_the_papers(training):
    made = network(class_dropout_prob=1.0 if training else 0.1).train(training)  # 1: every row with r = t
    result = objective()(made, given()[0], DataVelocity(), Full(), *given()[1:])
    with sdpa_kernel(SDPBackend.MATH):
        of_average, of_velocity = by_the_paper(made, dropped=(0, 4) if training else ())
    wanted = torch.stack(of_average).mean() + torch.stack(of_velocity).mean()
    torch.testing.assert_close(result.loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.terms["velocity"], torch.stack(of_velocity).mean().detach(), rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss, list(made.parameters())) for loss in (result.loss, wanted))
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-9, atol=1e-12)


def test_without_a_head_the_velocity_is_the_average_of_no_span():
    made = network(velocity_head=False)
    result = objective()(made, given()[0], DataVelocity(), Full(), *given()[1:])
    batch, noise, t, end, guidance = given()
    x = (1 - t.view(-1, 1, 1, 1)) * noise + t.view(-1, 1, 1, 1) * batch.x1
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    w = torch.tensor([3.0, 2.0, 1.0, 1.5, 8.0], dtype=torch.float64)  # the third is outside its interval
    with torch.no_grad():
        direction = made.predict(x, t, Guided(batch.cond, w, zero, one), zero)
        v_c = made.predict(x, t, Guided(batch.cond, guidance[:, 0], zero, one), zero)
        v_u = made.predict(x, t, Guided(torch.full_like(batch.cond, 3), one, zero, one), zero)
        v_g = batch.x1 - noise + (1 - 1 / w).view(-1, 1, 1, 1) * (v_c - v_u)
    told = Guided(batch.cond, *guidance.unbind(1))
    (answer,) = Full()(made, x, told, [Question(t, end - t, (direction, one, -one))])
    compound = answer.prediction - (end - t).view(-1, 1, 1, 1) * answer.tangent
    e2 = (compound - v_g).square().flatten(1).sum(1)
    torch.testing.assert_close(result.loss, (e2 / (e2.detach() + 0.01)).mean())
    assert "velocity" not in result.terms


def test_the_fixed_point_is_ordinary_guidance():
    """v_g = v + (1 - 1/w)(V - v_u) with V = v_g on average: V = v_u + w (v_c - v_u)."""
    v_c, v_u, w, V = 2.0, -1.0, 5.0, 0.0
    for _ in range(200):
        V = v_c + (1 - 1 / w) * (V - v_u)
    assert V == pytest.approx(v_u + w * (v_c - v_u))


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, 2.0])
def test_scales_have_the_density_that_is_said(power):
    drawn = objective(scale_power=power).scale(torch.linspace(0, 1, 1001).double())
    assert drawn[0] == pytest.approx(1) and drawn[-1] == pytest.approx(8)
    w = torch.linspace(1, 8, 200_001).double()
    mass = torch.cumulative_trapezoid(w**-power, w)  # by quadrature, not by the closed form
    for quantile in (0.1, 0.5, 0.9):
        at = w[1:][int(torch.searchsorted(mass, quantile * mass[-1]))]
        assert float(drawn[round(quantile * 1000)]) == pytest.approx(float(at), rel=1e-4)


def test_what_is_drawn():
    torch.manual_seed(0)
    t, end, guidance = objective().draw(20_000)
    scale, low, high = guidance.unbind(1)
    instant = t == end
    assert float(instant.float().mean()) == pytest.approx(0.5, abs=0.015) and bool((t <= end).all())
    assert bool((low[instant] == 0).all()) and bool((high[instant] == 1).all())
    rest = ~instant
    assert float(low[rest].mean()) == pytest.approx(0.25, abs=0.01) and float(low[rest].max()) <= 0.5
    assert float(high[rest].mean()) == pytest.approx(0.75, abs=0.01) and float(high[rest].min()) >= 0.5
    assert float(scale.log().mean()) == pytest.approx(torch.tensor(8.0).log().item() / 2, abs=0.02)
    assert float(torch.logit(t).mean()) == pytest.approx(0.4 - torch.pi**-0.5, abs=0.03)  # of two draws the earlier
    assert float(torch.logit(end[rest]).mean()) == pytest.approx(0.4 + torch.pi**-0.5, abs=0.03)


# ---------------------------------------------------------------------------------------------------------- engines

ENGINES = [Chain(True), Chain("selective"), Chain(False), TwoPass(), TwoPass(checkpoint=True)]


def answer(engine, made):
    batch, noise, t, end, guidance = given()
    told = Guided(batch.cond, *guidance.unbind(1), "both")
    (found,) = engine(made, noise, told, [Question(t, end - t, (batch.x1, torch.ones_like(t), -torch.ones_like(t)))])
    gradients = torch.autograd.grad(found.prediction.square().sum(), list(made.parameters()))
    return [found.prediction, found.tangent, *gradients]


def test_engines_carry_guidance_and_both_heads():
    wanted = answer(Full(), network())
    assert wanted[0].shape == (5, 2, 4, 4) and bool((wanted[1][:, 0] != 0).all())
    for engine in ENGINES:
        for ours, theirs in zip(answer(engine, network()), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=str(engine))
    found = answer(FiniteDifference(dtype="float64"), network())
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-7)


def test_compiled_blocks_do_too():
    made = network(depth=1, head_depth=1)
    wanted = answer(Full(), made)
    compile_blocks(made, backend="eager")
    for ours, theirs in zip(answer(Chain(), made), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_replayed_step_draws_and_computes_the_same():
    made = network(class_dropout_prob=0.1).float().train()
    assert check_objective(objective(), made) == [None]


# ---------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("velocity_head", [False, True])
def test_the_network_keeps_the_rules(velocity_head):
    check_backbone(network(velocity_head=velocity_head).float())


def test_it_is_told_all_that_is_said_and_no_time():
    made, (batch, noise, t, end, guidance) = network(), given()
    told = Guided(batch.cond, *guidance.unbind(1))
    here = made.predict(noise, t, told, end - t)
    assert torch.equal(here, made.predict(noise, t + 0.2, told, end - t))
    for other in (
        told._replace(scale=told.scale + 1), told._replace(low=told.low + 0.1), told._replace(high=told.high - 0.1),
        told._replace(cond=(batch.cond + 1) % 3),
    ):  # fmt: skip
        assert bool((made.predict(noise, t, other, end - t) != here).flatten(1).any(1).all())
    assert bool((made.predict(noise, t, told, end - t + 0.1) != here).flatten(1).any(1).all())
    plain = made.predict(noise, t, batch.cond, end - t)
    torch.testing.assert_close(plain, made.predict(noise, t, Guided.alike(batch.cond, t), end - t))


def test_it_starts_from_zero_and_counts_as_published():
    fresh = IMFDiT(4, 2, 1, 16, 3, 2, 2, num_classes=3)
    assert not fresh.predict(torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 1]), torch.rand(2)).any()
    with torch.device("meta"):
        for preset, millions in {"B/2": 89, "M/2": 174, "L/2": 409, "XL/2": 610}.items():
            sizes = {"num_classes": 1000, "velocity_head": False}
            count = sum(p.numel() for p in IMFDiT.from_preset(preset, **sizes).parameters())
            assert count == pytest.approx(millions * 1e6, rel=0.02), preset


def test_sampling_asks_the_network_once_and_never_its_velocity_head():
    made = network()
    calls = {"average": 0, "velocity": 0}
    for name, module in made.named_modules():
        kind = name.rsplit(".", 1)[-1]
        if kind in calls:
            module.register_forward_hook(lambda *_, kind=kind: calls.update({kind: calls[kind] + 1}))
    noise, labels = given()[1], given()[0].cond
    sampler = MeanFlowSampler(steps=2, guidance_scale=4.0, guidance_low=0.3, guidance_high=0.6)
    found = sampler.sample(made, noise, labels, SPAN)
    assert calls == {"average": 4, "velocity": 0}  # two steps, two blocks in the stack
    half, one = torch.full((5,), 0.5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    told = Guided(labels, 4 * one, 0.3 * one, 0.6 * one)
    with torch.no_grad():
        x = noise + 0.5 * made.predict(noise, 0 * one, told, half)
        torch.testing.assert_close(found, x + 0.5 * made.predict(x, half, told, half))
        bare = network(velocity_head=False)
        names, settings = made.without_training_parts()
        bare.load_state_dict({name: value for name, value in made.state_dict().items() if name not in names})
        torch.testing.assert_close(sampler.sample(bare, noise, labels, SPAN), found)
    assert settings == {"velocity_head": False} and bare.without_training_parts() == (set(), {})


def test_refusals():
    t = torch.rand(5)
    with pytest.raises(ConfigError, match="objective/interval=span"):
        AuxiliaryInterval("end").check(network())
    with pytest.raises(ConfigError, match="objective/interval=span"):
        ExpandedInterval().check(network())
    with pytest.raises(ConfigError, match="backbone=imf_dit"):
        objective().check(LightningDiT(4, 2, 1, 16, 1, 2, num_classes=3, auxiliary_time_cond=True))
    with pytest.raises(ConfigError, match="class_dropout_prob"):
        objective().check(network(class_dropout_prob=0.0))
    with pytest.raises(ConfigError, match="class_dropout_prob"):
        objective().check(network(num_classes=0))
    with pytest.raises(ConfigError, match="velocity_head=false"):
        ComposedObjective(SPAN, Uniform(), shortcut=MeanFlowShortcut()).check(network())
    with pytest.raises(ConfigError, match="velocity_head=true"):
        made = network(velocity_head=False)
        made.predict(given()[1], t, Guided.alike(given()[0].cond, t)._replace(asked="velocity"), t)
    with pytest.raises(ConfigError, match="guidance_scale=1"):
        Guidance(0.0).velocity(network(), given()[1], SPAN.shortcut(t), given()[0].cond, t)
    objective().check(network())


def test_a_network_that_predicts_the_data_learns_clipped_velocities():
    """Against the formulas with the same weights in a network whose answer is taken for the data."""
    plain, made = network(), network(predicts="x")
    made.load_state_dict(plain.state_dict())
    batch, noise, *drawn = late(*given())
    result = objective()(made, batch, DataVelocity(), Chain(), noise, *drawn)
    with sdpa_kernel(SDPBackend.MATH):
        of_average, of_velocity = by_the_paper(plain, of_data=True)
    wanted = torch.stack(of_average).mean() + torch.stack(of_velocity).mean()
    torch.testing.assert_close(result.loss, wanted, rtol=1e-11, atol=0)
    ours = torch.autograd.grad(result.loss, list(made.parameters()))
    theirs = torch.autograd.grad(wanted, list(plain.parameters()))
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-11)
    assert bool((result.tangent[3:] == 0).all()) and bool((result.tangent[:3] != 0).any())
    check_backbone(network(predicts="x"), torch.tensor([0, 1, 2]))
