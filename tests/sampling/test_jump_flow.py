"""Jump, return, flow, jump, and returns that keep a share of the implied noise."""

from __future__ import annotations

import math

import pytest
import torch

from flowanchor.errors import ConfigError
from flowanchor.generation.samplers import check_sampler
from flowanchor.jumps.segments import back, kept_by_rule
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.flow import FlowSampler
from flowanchor.plugins.samplers.jump_flow import JumpFlowSampler
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler

from .test_samplers import Counter, Decay, transformer


def noises(*shape):
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_are_the_consistency_samplers(steps):
    noise, fresh = noises(3, 1, 2, 2)
    drawn = [
        kind(steps).sample(Decay(), noise, None, ExpandedInterval(), lambda step: fresh)
        for kind in (ConsistencySampler, JumpFlowSampler)
    ]
    assert torch.equal(*drawn)


def midpoint(x, start, stop, steps):
    """Of dx/dt = -x, in closed form: each step multiplies by 1 - h + h^2 / 2."""
    h = (stop - start) / steps
    return x * (1 - h + h * h / 2) ** steps


@pytest.mark.parametrize("steps", [3, 4, 5, 8])
def test_what_lies_between_is_the_anchors_midpoint_rule(steps):
    noise, fresh = noises(3, 1, 2, 2)
    network, sampler = Decay(), JumpFlowSampler(steps, middle=0.4, flow_end=0.8)
    drawn = sampler.sample(network, noise, None, ExpandedInterval(), lambda step: fresh)
    x = 0.4 * noise * math.exp(-1) + 0.6 * fresh
    if steps % 2:
        x = midpoint(x, 0.4, 1.0, (steps - 1) // 2)
    else:
        x = midpoint(x, 0.4, 0.8, (steps - 2) // 2) * math.exp(-0.2)
    torch.testing.assert_close(drawn, x)
    assert len(network.told) == sampler.nfe == steps
    anchored = [time for time in network.told if time > 1]
    assert len(anchored) == 2 * ((steps - 1) // 2)
    times = [2 - time if time > 1 else time for time in network.told]
    assert times == pytest.approx(sampler.asked)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("interval", [ExpandedInterval, AuxiliaryInterval])
def test_network_calls_are_counted(steps, interval):
    network = Counter(transformer(auxiliary_time_cond=interval is AuxiliaryInterval))
    noise, fresh = noises(2, *network.sample_shape)
    sampler = JumpFlowSampler(steps, guidance_scale=2.0, guidance_low=0.3, guidance_high=0.75)
    sampler.sample(network, noise, torch.tensor([0, 1]), interval(), lambda step: fresh)
    assert network.calls == sampler.network_calls > steps - 1
    assert sampler.with_nfe(5).nfe == 5 and sampler.with_nfe(5).guidance == sampler.guidance


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="interval=expanded"):
        check_sampler(JumpFlowSampler(), "shortcut", PlainInterval())
    with pytest.raises(ConfigError, match="objective=facm"):
        check_sampler(JumpFlowSampler(), "flow", ExpandedInterval())
    for bad in ({"middle": 0.0}, {"middle": 0.9, "flow_end": 0.8}, {"flow_end": 1.0}):
        with pytest.raises(ConfigError, match="sampler.middle=.* sampler.flow_end="):
            JumpFlowSampler(**bad)
    with pytest.raises(ConfigError, match="sampler.kept_noise=1.5"):
        JumpFlowSampler(kept_noise=1.5)
    for bad in (0, 2.0, True):
        with pytest.raises(ConfigError, match="sampler.steps="):
            JumpFlowSampler(bad)
    with pytest.raises(ConfigError, match="nfe=0|sampler.steps=0"):
        JumpFlowSampler().with_nfe(0)


# ------------------------------------------------------------------------------------------------------- kept noise


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_a_return_has_the_marginals_of_two_gaussians(kept):
    """Data N(2, 0.5^2) and noise N(0, 1), of which a jump implies a pair: at any earlier time, mean and variance are
    t 2 and t^2 0.25 + (1 - t)^2, whatever share is kept."""
    draw = torch.Generator().manual_seed(0)
    noise, data, fresh = torch.randn(3, 400_000, dtype=torch.float64, generator=draw)
    data = 2 + 0.5 * data
    for time in (0.2, 0.7):
        x = back(data, 1.0, time, fresh, noise, kept)
        assert float(x.mean()) == pytest.approx(2 * time, abs=5e-3)
        assert float(x.var()) == pytest.approx(0.25 * time**2 + (1 - time) ** 2, rel=1e-2)
        correlation = float(torch.corrcoef(torch.stack([x - time * data, noise]))[0, 1])
        assert correlation == pytest.approx(kept, abs=5e-3)


def test_the_noise_that_a_jump_implies():
    """On a straight line from noise to data, keeping all of it stays on the line."""
    noise, data = noises(3, 1, 2, 2)

    class Straight(Decay):
        def head(self, tokens, context):
            t = context.carried[0].view(-1, 1, 1, 1)
            return (data - tokens) / (1 - t)

    seen = []

    class Watched(Straight):
        def embed(self, x, t, cond, r=None):
            seen.append((x.double(), float(t[0])))
            return super().embed(x, t, cond, r)

    sampler = ConsistencySampler(times=[0.0, 0.25, 0.6], kept_noise=1.0)
    drawn = sampler.sample(Watched(), noise, None, ExpandedInterval(), lambda step: 100 * noise)
    torch.testing.assert_close(drawn, data)
    for x, time in seen:
        torch.testing.assert_close(x, (1 - time) * noise + time * data)
    by_rule = ConsistencySampler(times=[0.0, 0.25, 0.6], kept_noise_h=0.0)
    torch.testing.assert_close(by_rule.sample(Watched(), noise, None, ExpandedInterval(), lambda step: noise), data)
    assert by_rule.with_nfe(3).kept_noise_h == 0.0


@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, 3.0])
def test_the_rule_in_the_other_direction_of_time(h):
    """m = ((T_to a_from) / (T_from a_to))^(h^2) with T = 1 - t and a = 1 - T."""
    for now, after in ((0.1, 0.5), (0.4, 0.41), (0.0, 0.3)):
        source, aim = 1 - now, 1 - after
        expected = 1.0 if h == 0 else (aim * (1 - source) / (source * (1 - aim))) ** (h**2)
        assert kept_by_rule(h, now, after) == pytest.approx(expected)
    assert 0 <= kept_by_rule(h, 0.1, 0.5) <= 1


def test_one_share_or_a_rule_and_no_boundaries():
    with pytest.raises(ConfigError, match="set one of them"):
        ConsistencySampler(kept_noise=0.1, kept_noise_h=1.0)
    with pytest.raises(ConfigError, match="leave out sampler.boundaries"):
        ConsistencySampler(kept_noise=0.1, boundaries=[0.5])


# ------------------------------------------------------------------------------------------------------- grids


def test_times_by_either_name():
    assert ConsistencySampler(times=[0, 0.4]).times.tolist() == ConsistencySampler(grid=[0, 0.4]).times.tolist()
    assert MeanFlowSampler(times=[0, 0.4]).with_nfe(2).times.tolist() == [0, 0.4, 1]
    with pytest.raises(ConfigError, match="older name of sampler.times"):
        ConsistencySampler(grid=[0], times=[0])
    flow = FlowSampler(times=[0, 0.3, 0.7], solver="midpoint")
    assert flow.nfe == 6 and flow.with_nfe(6).times.tolist() == [0, 0.3, 0.7, 1]
    with pytest.raises(ConfigError, match="remove the times"):
        flow.with_nfe(4)


def test_a_shift_of_five_in_the_other_direction_of_time():
    """The grid of diffusers, T = 5 u / (1 + 4 u) for u from 1 to 0, is timestep_shift = 1 / 5."""
    u = torch.linspace(1, 0, 5, dtype=torch.float64)
    torch.testing.assert_close(ConsistencySampler(4, timestep_shift=0.2).times, 1 - 5 * u / (1 + 4 * u))
