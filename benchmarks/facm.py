"""A whole FACM step: what one training step of the project's main method costs on an engine."""

from __future__ import annotations

from typing import Any

import torch

from flowanchor.interfaces import Batch
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from workloads import ENGINES, Workload, lightningdit


def facm_parts(**size: Any) -> tuple[LightningDiT, CheckpointVelocity, ComposedObjective]:
    """FACM (arXiv 2507.03738): a student, a frozen teacher with guidance, and the loss of anchor and shortcut."""
    student = lightningdit(**size)
    teacher = CheckpointVelocity.of_network(lightningdit(seed=1, **size), Guidance(1.75, 0.125, 1.0))
    return (
        student,
        teacher,
        ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), ConsistencyShortcut()),
    )


def facm_step(engine: str, batch: int = 8, **size: Any) -> Workload:
    """FACM's loss of one batch, and its gradient."""
    student, teacher, objective = facm_parts(**size)
    ask = ENGINES[engine]()
    data = Batch(torch.randn(batch, *student.sample_shape), torch.randint(0, 10, (batch,)))
    return Workload(lambda: objective(student, data, teacher, ask).loss.backward(), student)
