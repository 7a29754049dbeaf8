"""What a network still knows of the flow: against closed forms, and at the question that stands for the velocity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Backbone, Batch, StageContext
from flowanchor.jumps.guidance import Guidance
from flowanchor.metrics.flow_error import Probe, teacher_network
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval

SCALE = 0.6  # standard deviation of the data


class Linear(Backbone):
    """The velocity of the flow from N(0, 1) to N(0, SCALE^2), plus `shift`; notes what it is asked."""

    def __init__(self, shift: float = 0.0, two_times: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.sample_shape = (1, 2, 2)
        self.conditioning = Classes(3)
        self.shift = nn.Parameter(torch.tensor(shift))
        self.takes_end_time = two_times
        self.asked: list[tuple[float, float | None]] = []
        self.modes: list[bool] = []

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        self.asked.append((float(t[0]), None if r is None else float(r[0])))
        self.modes.append(self.training)
        return x, StageContext((t,), (cond,))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        t = context.carried[0]
        t = torch.where(t > 1, 2 - t, t).view(-1, 1, 1, 1)
        slope = (t * SCALE**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * SCALE**2)
        return slope * tokens + self.shift


def batches(count: int, size: int = 500) -> list[Batch]:
    torch.manual_seed(0)
    x1 = SCALE * torch.randn(count, 1, 2, 2)
    return [Batch(x1[i : i + size], torch.arange(len(x1[i : i + size])) % 3) for i in range(0, count, size)]


def test_the_best_network_has_the_variance_of_the_velocity_as_its_error():
    """Closed form: Var(x1 - x0 | x_t) = s^2 / ((1 - t)^2 + t^2 s^2) of data N(0, s^2)."""
    times = (0.05, 0.5, 0.95)
    found = Probe.of(batches(20_000), 20_000).measure(Linear(), PlainInterval(), times)
    expected = [SCALE**2 / ((1 - t) ** 2 + t**2 * SCALE**2) for t in times]
    assert [line.error for line in found] == pytest.approx(expected, rel=0.02)  # 80,000 values: standard error 0.5 %
    assert [line.t for line in found] == list(times) and found[0].cosine is None and found[0].from_teacher is None


def test_a_shift_from_the_teacher_is_its_square_and_its_angle():
    probe = Probe.of(batches(300), 300)
    teacher = teacher_network(Linear(), None, Guidance())
    line = probe.measure(Linear(0.5), ExpandedInterval(), (0.25,), teacher)[0]
    x1 = np.concatenate([batch.x1.numpy() for batch in probe.batches]).astype(np.float64).reshape(300, 4)
    x0 = np.concatenate([noise.numpy() for noise in probe.noise]).reshape(300, 4)
    slope = (0.25 * SCALE**2 - 0.75) / (0.75**2 + 0.25**2 * SCALE**2)
    velocity = slope * (0.75 * x0 + 0.25 * x1)
    moved = velocity + 0.5
    norms = np.linalg.norm(velocity, axis=1) * np.linalg.norm(moved, axis=1)
    assert line.from_teacher == pytest.approx(0.25, rel=1e-5)
    assert line.cosine == pytest.approx(np.mean((velocity * moved).sum(1) / norms), rel=1e-5)
    assert line.error == pytest.approx(np.mean((moved - (x1 - x0)) ** 2), rel=1e-5)


@pytest.mark.parametrize(
    ("interval", "two_times", "asked"),
    [
        (PlainInterval(), False, (0.25, None)),
        (ExpandedInterval(), False, (1.75, None)),
        (AuxiliaryInterval(), True, (0.25, 0.25)),
        (AuxiliaryInterval("span"), True, (0.25, 0.0)),
        (PlainInterval(), True, (0.25, 0.25)),
    ],
)
def test_the_anchors_question_is_asked_in_evaluation_mode(interval, two_times, asked):
    network = Linear(two_times=two_times).train()
    Probe.of(batches(4), 4).measure(network, interval, (0.25,))
    assert network.asked == [pytest.approx(asked)] and network.modes == [False] and network.training


def test_noise_belongs_to_samples_and_no_more_are_taken_than_asked_for():
    small, large = (Probe.of(batches(40, size), 25) for size in (10, 40))
    assert [len(batch.x1) for batch in small.batches] == [10, 10, 5] and len(large.batches[0].cond) == 25
    one, other = (probe.measure(Linear(0.1), PlainInterval(), (0.5,))[0].error for probe in (small, large))
    assert one == pytest.approx(other, rel=1e-6)
    later = Probe.of(batches(40), 25, first=25)
    assert not torch.equal(later.noise[0], large.noise[0])
    assert torch.equal(Probe.of(batches(40), 10, first=15).noise[0], large.noise[0][15:25])


def test_what_cannot_be_measured():
    with pytest.raises(DataError, match="raise data.heldout"):
        Probe.of([], 10)
    for times in ([], [1.0], [-0.1], [float("nan")]):
        with pytest.raises(ConfigError, match="times in"):
            Probe.of(batches(4), 4).measure(Linear(), PlainInterval(), times)
