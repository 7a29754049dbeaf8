"""The contract that lets a step be captured: every objective keeps it, and what breaks it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.graphs.capture import CaptureError
from flowanchor.interfaces import Ask, Point, Shortcut, StepNumber, TermResult
from flowanchor.jvp import Chain, Full, TwoPass
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.testing import check_objective

from .runs import CONF, assert_equal_runs, backbone, batch_for, fit, objective

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEDULES = {
    "alpha_flow": (["objective.shortcut.run_steps=20"], [0, 5, 9, 10, 12, 25, 26]),
    "scm": (["objective.shortcut.warmup_steps=20"], [0, 5, 9, 30]),
}
NAMES = sorted(file.stem for file in Path(CONF, "objective").glob("*.yaml"))
ENGINES = [Chain(), Full(), TwoPass()]  # the others: test_trainer.py


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_keeps_it(name: str) -> None:
    overrides, steps = SCHEDULES.get(name, ([], [0, 2]))
    phases = check_objective(objective(f"objective={name}", *overrides), steps=steps)
    assert phases == (["flow", "discrete", "tangent"] if name == "alpha_flow" else [None])


QUICK = [("facm", "dit"), ("facm", "wan"), ("alpha_flow", "wan"), ("imf", "wan")]


@pytest.mark.parametrize(
    "name, network",
    [
        # An objective keeps it above, a network in what one asks of it: here with all of the engines, and with phases.
        # A DiT is a SiT that does more.
        pytest.param(
            name,
            network,
            marks=[] if (name, network) in QUICK else [pytest.mark.slow],
        )
        for name in NAMES
        for network in ("sit", "dit", "wan")
        if name != "imf_whole"  # they take no guidance
    ],
)
def test_with_every_network_and_engine(name: str, network: str) -> None:
    """LightningDiT is the one above; what asks no tangent asks no engine."""
    overrides, steps = SCHEDULES.get(name, ([], [0, 2]))
    goal = objective(f"objective={name}", *overrides)
    student = backbone(network, goal.interval)
    for engine in ENGINES if name == "facm" else ENGINES[:1]:
        check_objective(goal, student, engine=engine, batch=batch_for(student, 2), steps=[steps[0], steps[-1]])


class Broken(Shortcut):
    """Regresses on the data's velocity, with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.number = fault, StepNumber(1.0)

    def at_step(self, step: int) -> None:
        self.step = step
        self.number.set(step)
        if self.fault == "new tensor":
            self.kept = torch.full((), float(step))

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, end, velocity = point
        error = (ask.along(velocity, x, t, end)[0] - velocity).square().flatten(1).mean(1)
        if self.fault == "step":
            error = error * self.step
        elif self.fault == "host":
            error = error * float(t.mean())
        elif self.fault == "tensor":
            error = error * torch.tensor(2.0, device=t.device)
        elif self.fault == "mask":
            error = error * t[t > 0.5].sum()
        elif self.fault == "new tensor":
            error = error * self.kept
        else:
            error = error * self.number.on(t.device)
        return TermResult(error)


def broken(fault: str) -> ComposedObjective:
    return ComposedObjective(PlainInterval(), Uniform(), shortcut=Broken(fault))


@pytest.mark.parametrize(
    "fault, said",
    [
        ("step", r"ComposedObjective.shortcut.step was 2 and is 3"),
        ("new tensor", r"shortcut.kept was another tensor"),
        ("host", r"the host waits for the device"),
        ("tensor", r"torch.tensor\(...\) copies a value of the host"),
        ("mask", r"by a mask"),
    ],
)
def test_what_breaks_it_is_named(fault: str, said: str) -> None:
    with pytest.raises((CaptureError, AssertionError), match=said):
        check_objective(broken(fault), steps=range(2, 6))


def test_what_breaks_nothing_is_not() -> None:
    check_objective(broken("none"), steps=range(2, 6))


def test_a_trainer_goes_on_without_a_graph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An objective that reads the step is found out at the first replay that would be wrong."""
    eager = fit(tmp_path, False, goal_object=broken("step"))
    auto = fit(tmp_path, True, goal_object=broken("step"), module_settings={"cuda_graph": "auto"})
    assert caplog.text.count("shortcut.step was 1 and is 3, and a number that changes must be a StepNumber") == 1
    assert auto["captured"] == 1 and auto["replayed"] == 1
    assert_equal_runs(eager, auto)
    with pytest.raises(ConfigError, match="cuda_graph=true cannot be, because ComposedObjective.shortcut.step was"):
        fit(tmp_path, True, goal_object=broken("step"))


class Dropping(torch.nn.Dropout):
    """As a block of the network."""

    def forward(self, tokens: Tensor, context: Any) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)


def test_a_stage_that_draws_and_is_computed_twice_is_refused() -> None:
    student = backbone()
    student.blocks.append(Dropping(0.5))
    with pytest.raises(CaptureError, match="a stage of the network draws random numbers and is computed twice"):
        check_objective(objective("objective=facm"), student)
