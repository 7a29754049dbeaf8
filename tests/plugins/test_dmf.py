"""DMF's MeanFlow: the times of its two halves and its weight, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Point
from flowanchor.plugins.objectives.intervals.end_time import EndTimeInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.dmf import DecoupledMeanFlowShortcut, EndVarianceWeight
from flowanchor.plugins.objectives.times.logit_normal import LogitNormal
from flowanchor.plugins.objectives.weights.power import PowerWeight
from flowanchor.testing import Answers

CONF = Path(__file__).parents[2] / "conf/objective"


def test_the_halves_have_times_of_their_own():
    """In the paper's direction: T ~ sigmoid N(0, 1) where both are one; N(0.4, 1) and N(-1.2, 1) in their order."""
    torch.manual_seed(0)
    size = 40_000
    t, r = DecoupledMeanFlowShortcut().draw(LogitNormal(0.0, 1.0), EndTimeInterval("decoupled"), size, None)
    half = size // 2
    assert torch.equal(t[:half], r[:half]) and bool((t[half:] < r[half:]).all())
    later, sooner = torch.logit(1 - t), torch.logit(1 - r)  # of noise: t is the noisier one
    assert abs(later[:half].mean()) < 0.03 and abs(later[:half].std() - 1) < 0.03
    total = (later + sooner)[half:]  # whatever their order, the sum is that of the two draws
    assert abs(total.mean() - (0.4 - 1.2)) < 0.04 and abs(total.std() - math.sqrt(2)) < 0.04
    spread = (later - sooner)[half:]  # the size of N(1.6, 2)
    assert abs(spread.square().mean() - (1.6**2 + 2)) < 0.15
    t, r = DecoupledMeanFlowShortcut().draw(LogitNormal(), ExpandedInterval(), 8, None)
    assert torch.equal(t[:4], r[:4]) and bool((r[4:] == 1).all())


def test_the_loss_of_each_sample_by_hand():
    shortcut = DecoupledMeanFlowShortcut().double()
    with torch.no_grad():
        shortcut.weight.linear.weight.copy_(torch.tensor([[0.3, -0.7]], dtype=torch.float64))
        shortcut.weight.linear.bias.fill_(0.2)
    ones = torch.ones(2, 1, 1, 2).double()
    t, r = torch.tensor([0.25, 0.5]).double(), torch.tensor([0.75, 0.5]).double()
    prediction = torch.tensor([2.0, 0.0]).double().view(2, 1, 1, 1) * ones
    prediction.requires_grad_()
    found = shortcut.loss(Answers(prediction, 4 * ones), Point(ones, t, r, 0.5 * ones)).loss
    for row, (error, w) in enumerate(((0.25, 0.2 + 0.3 * 0.25 - 0.7 * 0.75), (0.25, 0.2 + 0.3 * 0.5 - 0.7 * 0.5))):
        # targets 0.5 + 0.5 * 4 = 2.5 and 0.5: both are missed by 0.5
        assert found[row].item() == pytest.approx(math.log(error / math.exp(w) + 0.01) + w, rel=1e-12)
    found.sum().backward()
    e, w = 0.25, 0.2 + 0.3 * 0.25 - 0.7 * 0.75
    slope = 1 / (e / math.exp(w) + 0.01) / math.exp(w)  # of the loss in the error
    assert prediction.grad[0].flatten()[0].item() == pytest.approx(slope * (2.0 - 2.5), rel=1e-12)
    assert shortcut.weight.linear.weight.grad.abs().min() > 0


def test_the_weight_starts_without_an_opinion():
    weight = EndVarianceWeight()
    loss = weight(torch.tensor([0.09, 4.0]), torch.rand(2, 2))
    torch.testing.assert_close(loss, torch.log(torch.tensor([0.1, 4.01])))
    with pytest.raises(ConfigError, match="must be above 0"):
        EndVarianceWeight(0.0)


def test_another_weight_takes_its_place():
    shortcut = DecoupledMeanFlowShortcut()
    shortcut.weight = PowerWeight(0.0, 1e-3, "mean")
    ones, t = torch.ones(2, 1, 1, 2), torch.tensor([0.2, 0.4])
    loss = shortcut.loss(Answers(3 * ones, ones), Point(ones, t, t, ones)).loss
    torch.testing.assert_close(loss, torch.full((2,), 4.0))


def test_the_recipe_is_the_published_one():
    shortcut = OmegaConf.load(CONF / "shortcut/dmf.yaml")
    assert (shortcut.share, shortcut.early_mean, shortcut.late_mean, shortcut.weight_epsilon) == (0.5, -0.4, 1.2, 0.01)
    recipe = OmegaConf.load(CONF / "dmf.yaml")
    assert (recipe.time.mean, recipe.time.std) == (0.0, 1.0) and {"interval": "decoupled"} in recipe.defaults
