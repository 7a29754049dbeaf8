"""Segments: where jumps end, grids that visit the boundaries, and the noise that leads back within one."""

from __future__ import annotations

import pytest
import torch

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Point, StageContext
from flowanchor.jumps.segments import back, segment, segmented_grid
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.testing import Answers


def test_a_boundary_starts_the_later_segment():
    t = torch.tensor([0.0, 0.1, 0.125, 0.5, 0.7, 1.0])
    start, end = segment(t, (0.125, 0.7))
    assert start.tolist() == pytest.approx([0, 0, 0.125, 0.125, 0.7, 0.7])
    assert end.tolist() == pytest.approx([0.125, 0.125, 0.7, 0.7, 1, 1])


@pytest.mark.parametrize(
    "steps, boundaries, wanted",
    [
        (2, [0.125], [0, 0.125, 1]),
        (4, [0.125], [0, 0.125, 0.5, 0.75, 1]),
        (8, [0.125], [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]),
        (3, [0.9, 0.95], [0, 0.9, 0.95, 1]),
        (4, [0.01, 0.6], [0, 0.01, 0.6, 0.75, 1]),
    ],
)
def test_grids_visit_every_boundary(steps, boundaries, wanted):
    times = segmented_grid(torch.linspace(0, 1, steps + 1, dtype=torch.float64), boundaries, "here")
    assert times.tolist() == pytest.approx(wanted)
    assert ConsistencySampler(steps, boundaries=boundaries).times.tolist() == pytest.approx(wanted)
    assert ConsistencySampler(9, boundaries=boundaries).with_nfe(steps).times.tolist() == pytest.approx(wanted)


def test_too_few_steps_and_bad_boundaries():
    with pytest.raises(ConfigError, match="use at least 2 steps"):
        ConsistencySampler(1, boundaries=[0.125])
    for bad in ([0.5, 0.5], [0.0], [1.2], ["x"]):
        with pytest.raises(ConfigError, match=r"\[0.125\]"):
            ConsistencyShortcut(boundaries=bad)


def test_the_way_back_has_the_marginal_of_the_path():
    """A state at 0.6 led back to 0.3 has signal 0.3 and noise 0.7 again."""
    draw = torch.Generator().manual_seed(0)
    x0, fresh = torch.randn(2, 400_000, generator=draw, dtype=torch.float64)
    data = 2.0
    x = back(0.4 * x0 + 0.6 * data, 0.6, 0.3, fresh)
    assert x.mean().item() == pytest.approx(0.6, abs=5e-3)
    assert x.std().item() == pytest.approx(0.7, abs=5e-3)
    assert torch.equal(back(x, 1.0, 0.25, fresh), 0.25 * x + 0.75 * fresh), "from the data: the ordinary renoising"


class Straight(Backbone):
    """Knows the average velocity to the end of each segment of a flow whose speed is 1 before 0.25 and 3 after it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.unused = torch.nn.ModuleList(), torch.nn.Parameter(torch.zeros(()))
        self.asked: list[float] = []

    def embed(self, x, t, cond, r=None):
        raise NotImplementedError

    def head(self, tokens, context: StageContext):
        raise NotImplementedError

    def predict(self, x, t, cond, r=None):
        self.asked.append(round(t[0].item(), 6))
        return torch.where(t < 0.25, 1.0, 3.0)[:, None].expand_as(x)


def test_the_sampler_goes_on_from_each_boundary():
    network = Straight()
    out = ConsistencySampler(2, boundaries=[0.25]).sample(network, torch.zeros(5, 2), None, ExpandedInterval())
    assert network.asked == [0.0, 0.250001]  # just behind: the boundary itself is the earlier expert's
    torch.testing.assert_close(out, torch.full((5, 2), 0.25 * 1 + 0.75 * 3, dtype=torch.float64))


@pytest.mark.parametrize("t, length, share", [(0.05, 0.075, 0.4), (0.5, 0.5, 0.375 / 0.875)])
def test_the_target_ends_with_the_segment(t, length, share):
    """v + (b - t) dF/dt, relaxed and weighed by the share of the segment that lies behind."""
    prediction, velocity, tangent = (torch.full((1, 2), value) for value in (0.4, 0.1, 0.2))
    ends = []

    class Noting(Answers):
        def along(self, velocity, x, t, end):
            ends.append(end.item())
            return super().along(velocity, x, t, end)

    point = Point(velocity, torch.tensor([t]), torch.ones(1), velocity)
    shortcut = ConsistencyShortcut(weight_power=0.0, boundaries=[0.125])
    found = shortcut.loss(Noting(prediction.requires_grad_(), tangent), point).loss
    residual = 0.4 - (0.1 + length * 0.2)
    wanted = torch.cos(torch.tensor(share * torch.pi / 2)) * ((1 - share**0.5) * residual) ** 2
    torch.testing.assert_close(found, wanted[None].float())
    assert ends == [pytest.approx(t + length)]
