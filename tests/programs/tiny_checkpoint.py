"""A checkpoint with random weights that draws digits."""

from __future__ import annotations

import torch
from hydra.utils import instantiate

BACKBONE = {
    "_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT",
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}


def save_checkpoint(path, kind="shortcut"):
    torch.manual_seed(0)
    network = instantiate(BACKBONE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    sampler = {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2}
    config = {
        "backbone": BACKBONE,
        "objective": {"interval": {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}},
        "sampler": {"_target_": "flowanchor.plugins.samplers.flow.FlowSampler", "steps": 2}
        if kind == "flow"
        else sampler,
        "codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"},
        "data": {
            "_target_": "flowanchor.plugins.data.digits.DigitsDataModule",
            "channels": 1,
            "size": 8,
            "num_classes": 10,
            "batch_size": 64,
        },
    }
    content = {
        "state_dict": {f"student.{name}": value for name, value in network.state_dict().items()},
        "ema": {"short": network.state_dict()},
        "flowanchor": {"format": 1, "kind": kind, "step": 7, "config": config},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path
