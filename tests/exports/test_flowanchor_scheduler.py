"""The scheduler that travels with a pipeline takes the steps of our sampler, with our noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowanchor.base.noise import renoiser, sample_noise
from flowanchor.exports.flowanchor_scheduler import FlowAnchorScheduler
from flowanchor.interfaces import Backbone
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.jump_flow import JumpFlowSampler

SHAPE = (3, 2, 1, 4, 4)


class Curved(Backbone):
    """A velocity that depends on everything it is told."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.asked = []

    def embed(self, x, t, cond, r=None):
        raise NotImplementedError

    head = embed

    def predict(self, x, t, cond, r=None):
        self.asked.append(1000 * (1 - t[0]))
        return torch.sin(self.scale * x) * (1 + t.view(-1, 1, 1, 1, 1)) - 0.3


def as_pipeline(scheduler, network, latents, steps):
    """The loop of `WanPipeline`, without guidance."""
    scheduler.set_timesteps(steps, device="cpu")
    scheduler.set_begin_index(0)
    asked = []
    for t in scheduler.timesteps:
        asked.append(t)
        noise_minus_data = -network.predict(latents.float(), 1 - t.expand(SHAPE[0]) / 1000, None)
        latents = scheduler.step(noise_minus_data, t, latents, return_dict=False)[0]
    return latents, asked


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (1, {}),
        (2, {}),
        (4, {}),
        (8, {"timestep_shift": 3.0}),
        (3, {"grid": [0.0, 0.2, 0.75]}),
        (4, {"boundaries": [0.125]}),
        (5, {"boundaries": [0.125, 0.5], "timestep_shift": 0.5}),
        (3, {"kept_noise": 0.3}),
        (4, {"kept_noise_h": 1.5, "timestep_shift": 0.5}),
        (3, {"kept_noise_h": 0.0}),
    ],
)
def test_the_steps_are_those_of_our_sampler(steps, settings, tmp_path):
    FlowAnchorScheduler(**settings).save_pretrained(tmp_path)
    scheduler, network = FlowAnchorScheduler.from_pretrained(tmp_path), Curved()
    latents = scheduler.initial_latents(SHAPE, seed=11, first=5)
    indices = range(5, 8)
    noise = sample_noise(11, indices, SHAPE[1:]).float()
    assert torch.equal(latents, noise)
    fresh = renoiser(11, indices, SHAPE[1:], "cpu")
    sampler = ConsistencySampler(steps=steps, **settings)
    expected = sampler.sample(network, noise, None, PlainInterval(), fresh)
    asked = list(network.asked)
    with torch.no_grad():
        found, timesteps = as_pipeline(scheduler, network, latents, steps)
    assert torch.equal(torch.stack(timesteps), torch.stack(asked))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # 1 - (1 - t) is not t in float32
    torch.testing.assert_close(1 - scheduler.sigmas, sampler.times.float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("steps", "settings"),
    [(1, {}), (2, {}), (3, {}), (4, {}), (6, {"timestep_shift": 0.3}), (7, {"kept_noise": 0.1, "timestep_shift": 0.3})],
)
def test_the_steps_between_two_jumps_are_those_of_our_sampler(steps, settings, tmp_path):
    FlowAnchorScheduler(**settings, flow=[0.4, 0.8]).save_pretrained(tmp_path)
    scheduler, network = FlowAnchorScheduler.from_pretrained(tmp_path), Curved()
    latents = scheduler.initial_latents(SHAPE, seed=11)
    sampler = JumpFlowSampler(steps, middle=0.4, flow_end=0.8, **settings)
    fresh = renoiser(11, range(3), SHAPE[1:], "cpu")
    expected = sampler.sample(network, latents, None, ExpandedInterval(), fresh)
    asked = list(network.asked)
    with torch.no_grad():
        found, timesteps = as_pipeline(scheduler, network, latents, steps)
    torch.testing.assert_close(torch.stack(timesteps), torch.stack(asked), rtol=0, atol=1e-4)  # of 1,000
    assert [bool(t < 0) for t in timesteps] == [0 < call <= 2 * ((steps - 1) // 2) for call in range(steps)]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        again, _ = as_pipeline(scheduler, network, latents, 2)  # a plan does not outlive its pass
    two = JumpFlowSampler(2, middle=0.4, flow_end=0.8, **settings)
    torch.testing.assert_close(
        again, two.sample(network, latents, None, ExpandedInterval(), fresh), rtol=1e-6, atol=1e-6
    )


def test_a_sample_does_not_depend_on_its_batch_and_another_seed_is_another_sample():
    scheduler, network = FlowAnchorScheduler(), Curved()
    with torch.no_grad():
        whole, _ = as_pipeline(scheduler, network, scheduler.initial_latents(SHAPE, seed=3), 2)
        later, _ = as_pipeline(scheduler, network, scheduler.initial_latents(SHAPE, seed=3, first=1), 2)
        other, _ = as_pipeline(scheduler, network, scheduler.initial_latents(SHAPE, seed=4), 2)
    assert torch.equal(whole[1:], later[:2])
    assert not torch.isclose(whole, other).all(dim=(1, 2, 3, 4)).any()


def test_without_a_seed_the_fresh_noise_is_the_generators():
    def last(generator):
        scheduler = FlowAnchorScheduler()
        scheduler.set_timesteps(2)
        return scheduler.step(torch.ones(SHAPE), 1000, torch.zeros(SHAPE), generator).prev_sample

    first, again, other = (last(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # the jump goes to x - sigma answer = -1, and half of the way back: -1/2 with noise of size 1/2
    assert abs(float(first.mean()) + 0.5) < 0.2 and 0.35 < float(first.std()) < 0.65
    assert not torch.equal(last(None), last(None))


def test_a_seed_of_the_configuration_serves_until_another_is_set():
    scheduler = FlowAnchorScheduler(seed=9)
    scheduler.set_timesteps(2)
    found = scheduler.step(torch.zeros(SHAPE), 1000, torch.zeros(SHAPE)).prev_sample
    assert torch.equal(found, 0.5 * sample_noise(9, range(3), SHAPE[1:], draw=1))


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="grid of 2 times"):
        FlowAnchorScheduler(grid=[0.0, 0.5]).set_timesteps(3)
    with pytest.raises(ValueError, match="cannot visit the 3 segments of this network: use 3"):
        FlowAnchorScheduler(boundaries=[0.1, 0.5]).set_timesteps(2)
    with pytest.raises(ValueError, match="do not increase: use more"):
        FlowAnchorScheduler(grid=[0.3, 0.6], boundaries=[0.2]).set_timesteps(2)
    scheduler = FlowAnchorScheduler()
    scheduler.set_timesteps(1)
    scheduler.step(torch.zeros(SHAPE), 1000, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="All steps are done"):
        scheduler.step(torch.zeros(SHAPE), 1000, torch.zeros(SHAPE))
