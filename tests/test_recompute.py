"""`jvp.recompute=auto`: what the plan says, and what a run does with the memory that there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from flowanchor.interfaces import Backbone, Times
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain
from flowanchor.jvp.attention.operator import Opaque
from flowanchor.jvp.live_bytes import LiveBytes
from flowanchor.jvp.memory_plan import StepOfShapes
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.recompute import HostMemory

from .graphs.runs import BACKBONES, KEPT, backbone, batch_for, differences, fit, objective

LARGE = 10**12


class Card:
    """A stand-in for a card's memory: so much room, of which the steps that are measured take `taken`, in turn."""

    def __init__(self, size: int, taken: Sequence[int] = ()) -> None:
        self.size, self.steps = size, list(taken)

    def room(self, held: int) -> int:
        return self.size

    def start(self) -> None: ...

    def taken(self) -> int | None:
        return self.steps.pop(0) if self.steps else None


class On(pl.Callback):
    """A run on this card."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        module.memory = self.card


def run(folder: Path, engine: Chain, card: Card | None = None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The form that a run has chosen, and what it has left."""
    callbacks = [] if card is None else [On(card)]
    graphs = settings.pop("graphs", False)
    found = fit(folder, graphs, engine=engine, callbacks=callbacks, steps=3, **settings)
    return engine.form, found


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return not [one for kind in KEPT for one in differences(ours[kind], theirs[kind], kind)]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if "jvp.recompute=auto" in r.getMessage()]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of a megabyte, for what comes after it."""
    monkeypatch.setattr(StepOfShapes, "peak", lambda *_: 10**6)


@pytest.mark.parametrize(
    "size, form, settings",
    [
        (0, True, {}),  # both other forms are planned
        (LARGE, False, {"graphs": True}),
    ],
)
def test_by_the_plan(tmp_path: Path, said: Any, size: int, form: Any, settings: dict[str, Any]) -> None:
    """The run is that with this form from the beginning, bit for bit: a trial leaves nothing."""
    found, ours = run(tmp_path / "auto", Chain("auto"), Card(size), **settings)
    assert found is form
    assert same(ours, run(tmp_path / "set", Chain(form), **settings)[1])
    assert len(said()) == 1 and f"is {str(form).lower()} in this run (planned: false " in said()[0]


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_a_trial_leaves_nothing(tmp_path: Path, said: Any, planned: None, settings: dict[str, Any]) -> None:
    test_by_the_plan(tmp_path, said, LARGE, False, settings)


def test_a_step_that_runs_out_of_memory(
    tmp_path: Path, said: Any, planned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falls back, goes on, and leaves no gradient of what it had done."""
    real = Chain._with_graph
    calls: list[int] = []

    def scarce(self: Chain, stage: Any, now: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, stage, now)

    monkeypatch.setattr(Chain, "_with_graph", scarce)
    found, ours = run(tmp_path / "auto", Chain("auto"), Card(LARGE))
    assert found == "selective" and len(calls) == 2
    assert same(ours, run(tmp_path / "set", Chain("selective"))[1])
    assert "a step of false ran out of memory" in said()[0]


def test_a_step_that_takes_more_than_planned(tmp_path: Path, said: Any, planned: None) -> None:
    found, _ = run(tmp_path, Chain("auto"), Card(10**10, [10**11, 10**9]))
    assert found == "selective"
    assert "is selective in this run" in said()[0] and "a step of false took 100.00 GB" in said()[0]


def test_the_forms_give_the_same_numbers(tmp_path: Path) -> None:
    runs = [run(tmp_path / str(form), Chain(form))[1]["weights"] for form in (True, "selective", False)]
    for other in runs[1:]:
        for name, value in runs[0].items():
            torch.testing.assert_close(value, other[name], atol=2e-4, rtol=0)


def deep(two: bool, depth: int = 2) -> Backbone:
    return LightningDiT(8, 2, 1, 32, depth, 2, num_classes=3, auxiliary_time_cond=two)


def taken(goal: Any, *given: Any) -> int:
    """Bytes of a step with values, the second one: the first walk of an engine is watched."""
    goal(*given).loss.backward()
    with LiveBytes() as counter:
        goal(*given).loss.backward()
    return counter.peak


@pytest.mark.parametrize("network, forms", [("deep", (False, "selective", True)), ("wan", (False, True))])
def test_the_plan_is_what_a_step_takes(network: str, forms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without values, as counted with them; and nothing of the true network changes."""
    monkeypatch.setitem(BACKBONES, "deep", deep)
    torch.manual_seed(0)
    goal = objective("objective=facm")
    student = backbone(network, goal.interval)
    batch, t = batch_for(student), torch.rand(4)
    noise, times = torch.randn_like(batch.x1), Times(t)
    step = StepOfShapes(student, goal, DataVelocity())
    engines = {form: Chain(form, Opaque(Chain().attention)) for form in forms}
    peaks = {form: step.peak(engine, batch, noise, times, t, 0) for form, engine in engines.items()}
    assert all(parameter.grad is None for parameter in student.parameters())
    for parameter in filter(lambda p: p.requires_grad, student.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for form, engine in engines.items():
        assert peaks[form] == pytest.approx(taken(goal, student, batch, DataVelocity(), engine, noise, *times), rel=0.1)
    if network == "deep":
        assert peaks[False] > peaks["selective"] > peaks[True]


def test_a_guided_teacher_is_planned() -> None:
    """It looks at the times on the host: where guidance reaches none of them, it is asked once."""
    torch.manual_seed(0)
    goal, student = objective("objective=facm"), deep(False, 1)
    teacher = CheckpointVelocity.of_network(deep(False, 1), Guidance(3.0, 0.6, 1.0))
    batch, t = batch_for(student), torch.tensor([0.1, 0.2, 0.3, 0.5])
    noise = torch.randn_like(batch.x1)
    engine = Chain(True, Opaque(Chain().attention))
    for parameter in filter(lambda p: p.requires_grad, student.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for on_host in (t, t + 0.4):
        planned = StepOfShapes(student, goal, teacher).peak(engine, batch, noise, Times(on_host), on_host, 0)
        teacher.at_times(on_host)
        assert planned == pytest.approx(taken(goal, student, batch, teacher, engine, noise, *Times(on_host)), rel=0.1)


def test_what_cannot_be_planned(tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*given: Any) -> int:
        raise RuntimeError("a value is read")

    monkeypatch.setattr(StepOfShapes, "peak", unknown)
    found, _ = run(tmp_path, Chain("auto"), Card(LARGE))
    assert found is True and "the step could not be planned: RuntimeError" in said()[0]


def test_alone_it_is_true() -> None:
    assert Chain("auto").form is True and "recompute='auto'" in repr(Chain("auto"))


def test_a_machine_has_room() -> None:
    assert 0 < HostMemory(2).room(0) <= HostMemory(1).room(0)
    assert HostMemory(1).room(10) == HostMemory(1).room(0) - 10
