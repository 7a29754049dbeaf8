"""For tests of plugins: whether an objective keeps the contract that a captured training step needs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from flowanchor.graphs.capture import CaptureError
from flowanchor.graphs.cuda import Outputs
from flowanchor.graphs.stand_in import StandIn
from flowanchor.graphs.steps import EAGER_RUNS, GraphedSteps
from flowanchor.interfaces import Ask, Backbone, Batch, Objective, TangentEngine, VelocityField
from flowanchor.jvp import Chain
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.teachers.data import DataVelocity


def check_objective(
    objective: Objective,
    student: Backbone | None = None,
    velocity: VelocityField | None = None,
    engine: TangentEngine | None = None,
    batch: Batch | None = None,
    steps: Iterable[int] = range(4),
) -> list[Hashable]:
    """Compute steps of a training twice, as they are and as if a CUDA graph were replayed, on any device.

    Loss, logged values and gradients must be the same bits, and the replayed step may do nothing that a capture
    refuses. Choose `steps` on both sides of where the objective changes.

    Args:
        student: any network; None: `small_student`, told as many times as the interval wants, and guidance.
        batch: samples for it; None: random ones of the student's shape and classes.
        steps: numbers of the training steps.

    Returns:
        The phases that were captured.

    Raises:
        CaptureError: what the step does that a graph cannot, or which attribute changes and is read in it.
        AssertionError: a replay has computed something else.
    """
    told = objective.interval
    if student is None:
        student = small_student(told.needs_end_time, told.end_time, objective.needs_guidance)
    velocity = DataVelocity() if velocity is None else velocity
    engine = Chain() if engine is None else engine
    batch = _random(student) if batch is None else batch
    objective.check(student)
    parameters = [p for p in (*student.parameters(), *objective.parameters()) if p.requires_grad]
    roots: tuple[Any, ...] = (objective, velocity, engine)

    def function(*inputs: Any) -> Outputs:
        x1, cond, *drawn = inputs
        result = objective(student, Batch(x1, cond), velocity, engine, *drawn)
        result.loss.backward()
        return {"loss": result.loss.detach(), **result.terms, **result.diagnostics}

    def graphed(guarded: bool) -> GraphedSteps:
        return GraphedSteps(
            function, parameters, StandIn(parameters, guarded), (student, velocity, objective), roots, _refuse
        )

    # The guard watches PyTorch's dispatcher, beside which some operators are rounded otherwise.
    exact, guarded = graphed(False), graphed(True)
    phases: dict[Hashable, None] = {}
    for step in steps:
        objective.at_step(step)
        for _ in range(1 if objective.phase in phases else EAGER_RUNS + 1):
            torch.manual_seed(step)
            noise = torch.randn_like(batch.x1)
            drawn = objective.draw(len(noise), torch.device("cpu"))
            routes = None if objective.asks_elsewhere else student.at_times(drawn.t), velocity.at_times(drawn.t)
            inputs = (*batch, noise, *(None if time is None else time.to(noise.device) for time in drawn))
            phase = (objective.phase, routes)
            wanted = _outcome(lambda inputs=inputs: function(*inputs), parameters)
            found = _outcome(lambda inputs=inputs, phase=phase: exact(inputs, phase), parameters)
            for name, value in wanted.items():
                assert _same(found[name], value), f"step {step}, phase {phase}: {name} differs in a replay"
            _outcome(lambda inputs=inputs, phase=phase: guarded(inputs, phase), parameters)
        phases[objective.phase] = None
    student.at_times(None), velocity.at_times(None)
    return list(phases)


class Answers(Ask):
    """Known answers of a network, so that a shortcut's formula can be tested by hand.

    Args:
        prediction, tangent: what F and its derivative are, [B, *].
        fixed: F where it is asked without gradient; None: the prediction.
    """

    def __init__(self, prediction: Tensor, tangent: Tensor, fixed: Tensor | None = None) -> None:
        self.prediction, self.tangent = prediction, tangent
        self.still = prediction.detach() if fixed is None else fixed

    def __call__(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        return self.prediction

    def fixed(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        return self.still

    def along(self, velocity: Tensor, x: Tensor, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        return self.prediction, self.tangent


def small_student(
    takes_end_time: bool = False, end_time: str | None = None, takes_guidance: bool = False
) -> LightningDiT:
    """A network of two blocks for samples [1, 4, 4] of three classes, away from its first weights."""
    torch.manual_seed(0)
    end_time = "auxiliary" if takes_end_time and end_time is None else end_time
    student = LightningDiT(4, 2, 1, 16, 2, 2, num_classes=3, end_time=end_time, guidance_cond=takes_guidance)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return student


def _random(student: Backbone) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x1 = torch.randn(4, *student.sample_shape, generator=generator)
    labels = torch.arange(4) % max(student.conditioning.classes, 1)
    device = next(student.parameters()).device
    return Batch(x1.to(device), labels.to(device) if student.conditioning.classes else None)


def _outcome(run: Any, parameters: list[torch.nn.Parameter]) -> dict[str, Tensor | None]:
    """What a step computes, with the same random numbers each time, and the gradients that it leaves."""
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(7)
    values = {name: value.clone() for name, value in run().items()}
    gradients = {f"gradient {i}": None if p.grad is None else p.grad.clone() for i, p in enumerate(parameters)}
    return {**values, **gradients}


def _same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def _refuse(reason: str) -> None:
    raise CaptureError(f"The step cannot be captured: {reason}.")
