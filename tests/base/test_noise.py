"""A device's share of the joint noise: the same for every sample, however many processes draw it."""

from __future__ import annotations

import math

import pytest
import torch

from flowanchor.base import noise
from flowanchor.base.noise import share_of_noise

SEEDS = (7, 1, 42)


@pytest.mark.parametrize("shape", [(3,), (4, 8, 8), (1, 300, 300)])  # many samples a draw, some, one
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_any_number_of_processes_draws_the_same(shape, processes):
    whole = share_of_noise(SEEDS, 0, 24, shape, "cpu")
    size = 24 // processes
    shares = [share_of_noise(SEEDS, rank * size, size, shape, "cpu") for rank in range(processes)]
    assert whole.shape == (24, *shape) and torch.equal(torch.cat(shares), whole)


def test_a_share_costs_no_more_than_its_samples_and_two_groups(monkeypatch):
    drawn = []
    randn = torch.randn

    def counted(*size, **settings):
        drawn.append(math.prod(size))
        return randn(*size, **settings)

    monkeypatch.setattr(noise.torch, "randn", counted)
    for shape, rank in (((2, 8, 8), 3), ((400, 400), 200)):
        drawn.clear()
        share_of_noise(SEEDS, rank * 4, 4, shape, "cpu")
        assert sum(drawn) <= 4 * math.prod(shape) + 2 * noise.DRAWN_AT_ONCE


def test_it_is_standard_normal_and_independent_between_samples_steps_and_streams():
    many = share_of_noise(SEEDS, 0, 64, (4, 32, 32), "cpu").double().flatten(1)  # 16 samples a draw: four groups
    n = many[0].numel()
    assert abs(many.mean()) < 4 / math.sqrt(64 * n) and abs(many.var() - 1) < 4 * math.sqrt(2 / (64 * n))
    other = share_of_noise((7, 1, 43), 0, 64, (4, 32, 32), "cpu").double().flatten(1)
    correlation = torch.corrcoef(torch.cat([many, other])) - torch.eye(128)
    assert correlation.abs().max() < 6 / math.sqrt(n)


def test_what_others_draw_is_not_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    share_of_noise(SEEDS, 5, 3, (2, 2), "cpu")
    assert torch.equal(torch.get_rng_state(), before)
