"""Networks that are loaded in a lower precision: what is stored in it, what is not, and what they draw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flowanchor
from flowanchor.checkpoints import load_model
from flowanchor.errors import ConfigError
from flowanchor.jumps.precision import asking, state_dtype
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.text.base import Tokens

WAN = {
    "preset": "nano", "in_channels": 4, "height": 8, "width": 8, "text_dim": 12, "num_layers": 2,
}  # fmt: skip
DIT = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}
NETWORKS = {
    "wan": ("flowanchor.plugins.backbones.wan.Wan.from_preset", WAN),
    "experts": ("flowanchor.plugins.backbones.wan_experts.WanExperts", WAN),
    "lightningdit": ("flowanchor.plugins.backbones.lightningdit.LightningDiT", {**DIT, "num_classes": 10}),
}
CODEC = {"_target_": "flowanchor.plugins.codecs.identity.Identity"}


@pytest.fixture(params=NETWORKS)
def checkpoint(request, tmp_path):
    target, settings = NETWORKS[request.param]
    network = {"wan": Wan.from_preset, "experts": WanExperts, "lightningdit": LightningDiT}[request.param](**settings)
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    interval = "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"
    config = {
        "backbone": {"_target_": target, **settings},
        "objective": {"interval": {"_target_": interval}},
        "sampler": {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2},
        "codec": CODEC,
    }
    content = {
        "state_dict": {f"student.{name}": value for name, value in network.state_dict().items()},
        "flowanchor": {"format": 1, "kind": "shortcut", "step": 7, "config": config},
    }
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_low(checkpoint, dtype):
    path, network = checkpoint
    low = load_model(path, dtype=dtype).backbone
    kept = {id(p) for module in low.float32_modules() for p in module.parameters()}
    stored = {name: p for name, p in low.named_parameters() if p.dtype == dtype}
    for name, parameter in low.named_parameters():
        exact = network.get_parameter(name)
        assert torch.equal(parameter, exact.to(parameter.dtype)), name
        assert parameter.dtype in (dtype, torch.float32)
    assert not kept & {id(p) for p in stored.values()}
    assert not any("scale_shift_table" in name or "norm" in name for name in stored)
    assert sum(p.numel() for p in stored.values()) > 0.8 * sum(p.numel() for p in low.parameters()) - sum(
        p.numel() for p in low.parameters() if id(p) in kept
    )
    assert state_dtype(low) == torch.float32 and state_dtype(network.double()) == torch.float64
    with asking(network, "cpu"):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), asking(network, "cpu"):  # as a training run does around its pictures
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_it_draws_nearly_the_same(checkpoint):
    """Within what bfloat16 keeps of a number, and not exactly: it did compute in bfloat16."""
    path, _ = checkpoint
    exact, low = flowanchor.load(path), flowanchor.load(path, dtype=torch.bfloat16)
    assert low.backbone.state_dict().keys() == exact.backbone.state_dict().keys()
    cond = torch.arange(6) if exact.backbone.conditioning.classes else Tokens(torch.randn(6, 5, 12))
    noise = torch.randn(6, *exact.backbone.sample_shape)
    from flowanchor.generation.samplers import build_sampler

    drawn = []
    for model in (exact, low):
        with asking(model.backbone, "cpu"):
            drawn.append(
                build_sampler({}, model).sample(model.backbone, noise, cond, model.interval, lambda step: noise)
            )
    assert drawn[0].dtype == drawn[1].dtype == torch.float64
    error = (drawn[1] - drawn[0]).norm() / (drawn[0] - noise).norm()
    assert 1e-5 < error < 0.03, error


def test_images_from_the_generator(checkpoint):
    path, network = checkpoint
    if not isinstance(network, LightningDiT):
        return  # prompts need a text encoder; tests/integration/test_wan_road.py has one
    exact, low = (flowanchor.load(path, dtype=dtype).sample([3, 4, 5]) for dtype in (None, torch.bfloat16))
    difference = (exact.int() - low.int()).abs().float()
    assert exact.shape == low.shape and difference.mean() < 4 and exact.float().std() > 5


def test_other_precisions_are_refused(checkpoint):
    with pytest.raises(ConfigError, match="no lower precision: use bfloat16 or float16"):
        load_model(checkpoint[0], dtype=torch.float64)
