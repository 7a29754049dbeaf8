"""Where these tests run: on a GPU, or, to try them, where FLOWANCHOR_TESTS_ON says (`cpu`).

They need PyTorch alone (`pytest --noconftest tests/gpu`); what a CPU has no counterpart for uses what it has.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from flowanchor.interfaces import Batch
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.arctan_lognormal import ArctanLogNormal
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity

DEVICE = os.environ.get("FLOWANCHOR_TESTS_ON", "cuda")
CUDA = DEVICE == "cuda"
needs_it = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="needs a CUDA device: make gpu-check"),
]
SIZE = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 144, "depth": 2, "num_heads": 2}
RELEASED = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}


def exactly() -> None:
    """Float32 is float32: no tensor cores, in products and in convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def network(seed: int = 0, **settings: int) -> LightningDiT:
    """Heads of 72 channels, every weight random."""
    torch.manual_seed(seed)
    made = LightningDiT(num_classes=10, disable_label_dropout=True, **RELEASED, **{**SIZE, **settings})
    for name, p in made.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.1)
    return made.to(DEVICE)


def batch_of(size: int, student: nn.Module) -> tuple[Batch, Tensor, Tensor]:
    """Latents with labels, noise, and times, the same on every device."""
    draw = torch.Generator().manual_seed(1)
    x1, noise = torch.randn(2, size, *student.sample_shape, generator=draw).to(DEVICE)
    labels, t = torch.randint(0, 10, (size,), generator=draw), torch.rand(size, generator=draw)
    return Batch(x1, labels.to(DEVICE)), noise, t.to(DEVICE)


def facm() -> ComposedObjective:
    return ComposedObjective(ExpandedInterval(), ArctanLogNormal(), FlowMatchingAnchor(), ConsistencyShortcut())


def taught_by(teacher: LightningDiT) -> CheckpointVelocity:
    return CheckpointVelocity.of_network(teacher, Guidance(1.75, 0.125, 1.0))


def autocast(low: bool = True) -> torch.autocast:
    """As Lightning does it: casts of weights are not kept."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=low, cache_enabled=False)


def gradient(student: nn.Module) -> Tensor:
    parts = [p.grad for p in student.parameters() if p.grad is not None]
    whole = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in parts]
    return torch.cat([part.detach().flatten() for part in whole]).double()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
