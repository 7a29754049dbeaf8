"""Samplers on networks whose flow is known, and noise that belongs to a sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from flowanchor.base.noise import sample_noise
from flowanchor.errors import ConfigError
from flowanchor.generation.generator import Generator
from flowanchor.generation.samplers import check_sampler
from flowanchor.interfaces import Backbone, StageContext
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.codecs.identity import Identity
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.flow import ADAPTIVE_SOLVERS, FIXED_SOLVERS, FlowSampler
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler


class Decay(Backbone):
    """v(x, t) = -x whose shortcut is exact: x(1) = x e^-(1 - t), so F(x, t) = x (e^-(1 - t) - 1) / (1 - t)."""

    sample_shape = (1, 2, 2)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.told: list[float] = []

    def embed(self, x, t, cond, r=None):
        self.told.append(float(t[0]))
        return x * self.scale, StageContext((t,))

    def head(self, tokens, context):
        t = context.carried[0].view(-1, 1, 1, 1)
        left = (1 - t).clamp_min(1e-12)
        return torch.where(t > 1, -tokens, tokens * (torch.exp(-left) - 1) / left)


@pytest.mark.parametrize("solver", ["euler", "heun", *FIXED_SOLVERS, *ADAPTIVE_SOLVERS])
def test_flow_sampler_integrates_the_anchor(solver):
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    network = Decay()
    sample = FlowSampler(steps=200, solver=solver, rtol=5e-8, atol=5e-8).sample(
        network, noise, None, ExpandedInterval()
    )
    tolerance = 2e-3 if solver == "euler" else 1e-5
    assert torch.allclose(sample, noise * math.exp(-1), atol=tolerance * noise.abs().max().item())
    assert min(network.told) >= 1, "the flow sampler must feed the anchor's condition 2 - t"


def test_heun_is_second_order_and_euler_first():
    noise = torch.ones(1, 1, 2, 2, dtype=torch.float64)

    def error(solver, steps):
        return (
            (FlowSampler(steps, solver).sample(Decay(), noise, None, ExpandedInterval()) - math.exp(-1))
            .abs()
            .max()
            .item()
        )

    assert 1.8 < error("euler", 20) / error("euler", 40) < 2.2
    assert error("heun", 40) < error("euler", 40) / 5


@pytest.mark.parametrize(
    ("sampler", "times"),
    [
        (MeanFlowSampler(4), [0, 0.25, 0.5, 0.75, 1]),
        (MeanFlowSampler(4, timestep_shift=0.2), [0, 1 / 16, 1 / 6, 3 / 8, 1]),
        (MeanFlowSampler(2, timestep_shift=0.2).with_nfe(4), [0, 1 / 16, 1 / 6, 3 / 8, 1]),
        (MeanFlowSampler(times=[0.1, 0.4]), [0.1, 0.4, 1]),
        (MeanFlowSampler(times=[0.0, 0.4]).with_nfe(2), [0, 0.4, 1]),
    ],
)
def test_averages_go_from_each_time_of_the_grid_to_the_next(sampler, times):
    class Averages(Decay):
        takes_end_time = True

        def embed(self, x, t, cond, r=None):
            self.told.append((float(t[0]), float(r[0])))
            return x * self.scale, StageContext((t, r))

        def head(self, tokens, context):
            span = (context.carried[1] - context.carried[0]).view(-1, 1, 1, 1)
            return tokens * (torch.exp(-span) - 1) / span

    network, noise = Averages(), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    drawn = sampler.sample(network, noise, None, AuxiliaryInterval())
    assert network.told == [pytest.approx(pair) for pair in zip(times[:-1], times[1:], strict=True)]
    assert sampler.nfe == sampler.network_calls == len(network.told)
    torch.testing.assert_close(drawn, noise * math.exp(times[0] - 1))
    assert sampler.told().startswith(f"meanflow, times {times[0]:.4g} {times[1]:.4g}")


def test_an_odd_number_of_evaluations_ends_with_a_step_of_eulers():
    """Of dx/dt = -x: a midpoint step multiplies by 1 - h + h^2 / 2, Euler's by 1 - h."""
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    usual = FlowSampler(25, "midpoint")

    def factor(sampler):
        drawn = sampler.sample(Decay(), noise, None, ExpandedInterval()) / noise
        assert torch.allclose(drawn, drawn[:1, :1, :1, :1].expand_as(drawn))
        return float(drawn[0, 0, 0, 0])

    one, h = usual.with_nfe(1), 2 / 5
    assert one.nfe == 1 and factor(one) == factor(FlowSampler(1)) == 0
    assert factor(usual.with_nfe(2)) == pytest.approx(1 - 1 + 1 / 2)
    assert factor(usual.with_nfe(5)) == pytest.approx((1 - h + h * h / 2) ** 2 * (1 - h / 2))
    assert usual.with_nfe(5).times.tolist() == pytest.approx([0, 0.4, 0.8, 1])
    network = Decay()
    usual.with_nfe(5).sample(network, noise, None, ExpandedInterval())
    assert [2 - time for time in network.told] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8]), "evenly"
    shifted = FlowSampler(25, "midpoint", timestep_shift=0.5).with_nfe(5)
    assert shifted.times.tolist() == pytest.approx([0, 0.25, 2 / 3, 1]) and shifted.with_nfe(4).nfe == 4
    given = FlowSampler(solver="midpoint", times=[0.0, 0.6])
    assert given.with_nfe(3).times.tolist() == [0.0, 0.6, 1.0]
    assert factor(given.with_nfe(3)) == pytest.approx((1 - 0.6 + 0.18) * 0.6)
    with pytest.raises(ConfigError, match="final_euler=true is for sampler.solver=midpoint, and this is heun"):
        FlowSampler(2, "heun", final_euler=True)


def test_the_option_takes_midpoint_steps_and_the_class_is_eulers_still():
    from flowanchor.parts import described

    assert {"steps": 25, "solver": "midpoint", "final_euler": False}.items() <= described("flow", "sampler").items()
    assert (FlowSampler().solver, FlowSampler().nfe) == ("euler", 50)


def test_consistency_sampler_jumps_to_the_end():
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    network = Decay()
    one = ConsistencySampler(1).sample(network, noise, None, ExpandedInterval())
    assert torch.allclose(one, noise * math.exp(-1))
    assert network.told == [0.0], "the shortcut is told t itself"


def test_consistency_steps_by_hand():
    noise, fresh = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    network = Decay()
    two = ConsistencySampler(grid=[0.0, 0.3]).sample(network, noise, None, ExpandedInterval(), lambda step: fresh)
    middle = 0.3 * noise * math.exp(-1) + 0.7 * fresh
    assert torch.allclose(two, middle * math.exp(-0.7))
    assert network.told == [0.0, 0.3]


@pytest.mark.parametrize("grid", [[], [0.5, 0.2], [0.0, 1.0], [-0.1]])
def test_bad_grids(grid):
    with pytest.raises(ConfigError, match="increasing times"):
        ConsistencySampler(grid=grid)


def test_timestep_shift():
    from flowanchor.jumps.grid import time_grid

    assert torch.equal(time_grid(4), torch.linspace(0, 1, 5, dtype=torch.float64))
    shifted = time_grid(4, timestep_shift=0.3)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.allclose(shifted, 0.3 * t / (1 - 0.7 * t))


class Counter(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0
        self.sample_shape = network.sample_shape
        self.takes_end_time, self.takes_guidance = network.takes_end_time, network.takes_guidance
        self.conditioning = network.conditioning

    def predict(self, *args):
        self.calls += 1
        return self.network.predict(*args)


def transformer(**settings):
    torch.manual_seed(0)
    network = LightningDiT(**{"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 2,
                              "num_heads": 2, "num_classes": 3, **settings})  # fmt: skip
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.parametrize(
    "sampler",
    [
        ConsistencySampler(3),
        ConsistencySampler(4, guidance_scale=2.0, guidance_low=0.3),
        *[FlowSampler(3, solver) for solver in ("euler", "heun", *FIXED_SOLVERS)],
        FlowSampler(5, "euler", guidance_scale=2.0, guidance_low=0.3, guidance_high=0.7),
        FlowSampler(5, "heun", guidance_scale=2.0, guidance_low=0.3, guidance_high=0.7),
        FlowSampler(3, "midpoint", guidance_scale=2.0, guidance_low=0.3, guidance_high=0.7),
        *[FlowSampler(25, "midpoint").with_nfe(nfe) for nfe in (1, 2, 5)],
        FlowSampler(25, "midpoint", guidance_scale=2.0, guidance_low=0.3, guidance_high=0.7).with_nfe(5),
    ],
    ids=lambda s: f"{s.label}-{s.guidance.scale}-{s.nfe}",
)
def test_the_stated_number_of_calls_is_the_counted_one(sampler):
    counter = Counter(transformer())
    sampler.sample(counter, torch.randn(2, 1, 4, 4), torch.tensor([0, 1]), ExpandedInterval())
    assert counter.calls == sampler.network_calls
    if sampler.guidance.scale == 1:
        assert counter.calls == sampler.nfe


def test_budgets():
    assert ConsistencySampler(2).with_nfe(4).nfe == 4
    assert FlowSampler(50).with_nfe(8).steps == 8
    assert FlowSampler(50, "heun").with_nfe(9).steps == 5
    assert FlowSampler(50, "rk4").with_nfe(8).steps == 2
    assert FlowSampler(25, "midpoint").with_nfe(8).steps == FlowSampler(25, "midpoint").with_nfe(7).steps == 4
    for sampler, nfe in (
        (ConsistencySampler(), 0), (FlowSampler(), 0), (FlowSampler(solver="heun"), 4), (FlowSampler(solver="rk4"), 6),
        (FlowSampler(solver="dopri5"), 6), (ConsistencySampler(grid=[0.0, 0.5]), 4),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"nfe={nfe}"):
            sampler.with_nfe(nfe)
    with pytest.raises(ConfigError, match="at least one step"):
        FlowSampler(steps=0)
    with pytest.raises(ConfigError, match="choose one of euler, heun"):
        FlowSampler(solver="leapfrog")


def test_a_shortcut_sampler_needs_a_shortcut():
    with pytest.raises(ConfigError, match="use sampler=flow"):
        check_sampler(ConsistencySampler(), "flow", ExpandedInterval())
    check_sampler(FlowSampler(), "shortcut", ExpandedInterval())


def test_second_time_reaches_the_network():
    network = transformer(auxiliary_time_cond=True)
    noise, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    a = FlowSampler(3).sample(network, noise, y, AuxiliaryInterval())
    b = FlowSampler(3).sample(network, noise, y, PlainInterval())
    assert torch.allclose(a, b), "both ask at r = t"
    assert not torch.allclose(a, ConsistencySampler(3).sample(network, noise, y, AuxiliaryInterval()))


@pytest.mark.parametrize("sampler", [ConsistencySampler(2), FlowSampler(4, guidance_scale=1.5)], ids=lambda s: s.label)
def test_same_seed_same_images_whatever_the_batch_size(sampler):
    network = transformer(hidden_size=64, num_heads=4)

    def draw(batch_size, start=0, count=37):
        generator = Generator(network, ExpandedInterval(), sampler, Identity())
        request = network.conditioning.request(37).part(start, start + count)
        return torch.cat(list(generator.draw(request, 5, batch_size, first=start))).numpy()

    whole = draw(37)
    assert whole.shape == (37, 4, 4, 1) and whole.dtype == np.uint8 and whole.std() > 1
    for other in (draw(1), draw(8), np.concatenate([draw(16, 0, 20), draw(16, 20, 17)])):
        # A matrix product rounds differently in another batch, which may tip a pixel over to the next grey level.
        difference = np.abs(whole.astype(int) - other.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.005


def test_noise_belongs_to_seed_index_and_draw():
    a = sample_noise(0, [3, 4], (2, 2))
    assert torch.equal(a[1], sample_noise(0, [4], (2, 2))[0])
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, sample_noise(1, [3, 4], (2, 2)))
    assert not torch.equal(a, sample_noise(0, [3, 4], (2, 2), draw=1))
    many = sample_noise(7, range(2000), (4,))
    assert abs(many.mean().item()) < 0.05 and abs(many.std().item() - 1) < 0.03 and len(many.unique()) == many.numel()
