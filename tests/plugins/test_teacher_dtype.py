"""A teacher that is kept in bfloat16: the same velocity where training casts it anyway, half the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowanchor.checkpoints.load import store_low
from flowanchor.deferred import defer_loading, is_deferred, materialise
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity, keeps_low
from flowanchor.strategies.sharding import shard_backbone
from flowanchor.text.base import Tokens

DIT: dict[str, Any] = {
    "input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
RELEASED = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
NETWORKS = {
    "LightningDiT": lambda: LightningDiT(**DIT, **RELEASED),
    "layers of DiT": lambda: LightningDiT(**DIT),
    "SiT": lambda: SiT(**DIT),
    "DiT": lambda: DiT(**DIT),
    "Wan": lambda: Wan.from_preset("nano", in_channels=2, height=4, width=4, num_layers=2, text_dim=12, text_len=6),
}


def made(name: str) -> Backbone:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for p in network.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return network


def velocity(network: Backbone, precision: str = "bf16-mixed", dtype: str = "float32") -> torch.Tensor:
    """A guided velocity, as a training of this precision asks for it."""
    draw = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, *network.sample_shape, generator=draw), torch.tensor([0.2, 0.6, 0.9])
    if network.conditioning.classes:
        cond = torch.randint(0, 5, (3,), generator=draw)
    else:
        cond = Tokens(torch.randn(3, 6, 12, generator=draw))
    field = CheckpointVelocity.of_network(network, Guidance(1.75, 0.125, 1.0))
    field.low = keeps_low(dtype, precision)
    if field.low:
        store_low(network, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
        return field(x, t, cond, x, network, ExpandedInterval())


@pytest.mark.parametrize("name", NETWORKS)
def test_where_every_product_is_cast_it_teaches_the_same(name):
    low = made(name)
    assert torch.equal(velocity(low, dtype="auto"), velocity(made(name)))
    held = sum(p.nbytes for p in low.parameters())
    assert held < 0.75 * sum(p.nbytes for p in made(name).parameters())


def test_in_a_float32_run_its_velocity_is_rounded():
    exact, rounded = (velocity(made("LightningDiT"), "32-true", dtype) for dtype in ("float32", "bfloat16"))
    assert torch.equal(exact, velocity(made("LightningDiT"), "32-true", "auto"))
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < 3e-2


def test_times_and_modulations_stay_in_float32():
    low = made("LightningDiT")
    store_low(low, torch.bfloat16)
    assert {p.dtype for module in low.float32_modules() for p in module.parameters()} == {torch.float32}
    assert low.blocks[0].attn.qkv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "precision", "low"),
    [
        ("auto", "bf16-mixed", True),
        ("auto", "32-true", False),
        ("auto", "bf16-true", False),  # the trainer casts all of it
        ("auto", "16-mixed", False),
        ("auto", 32, False),
        ("bfloat16", "32-true", True),
        ("bfloat16", "bf16-true", False),
        ("float32", "bf16-mixed", False),
    ],
)
def test_what_auto_means(dtype, precision, low):
    assert keeps_low(dtype, precision) is low


def test_another_type_is_refused():
    with pytest.raises(ConfigError, match="teacher.dtype=int8 is unknown: choose auto, float32 or bfloat16"):
        keeps_low("int8", "bf16-mixed")


def test_sharded_it_teaches_the_same():
    """Gathered in bfloat16 either way; its shards take half."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        found = []
        for dtype in ("float32", "auto"):
            network = made("LightningDiT").requires_grad_(False)
            if dtype == "auto":
                store_low(network, torch.bfloat16)
            shard_backbone(network, init_device_mesh("cpu", (1,)), param_dtype=torch.bfloat16)
            found.append((velocity(network), sum(p.nbytes for p in network.parameters())))
        (wanted, whole), (ours, held) = found
        assert torch.equal(ours, wanted) and held < 0.75 * whole
    finally:
        dist.destroy_process_group()


def test_a_deferred_teacher_is_read_into_bfloat16(tmp_path):
    from flowanchor.checkpoints.consolidated import FORMAT

    network = made("LightningDiT")
    target = {"_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", **DIT, **RELEASED}
    interval = {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}
    config = {"backbone": target, "objective": {"interval": interval}}
    state = {f"student.{name}": value for name, value in network.state_dict().items()}
    meta = {"format": FORMAT, "kind": "flow", "config": config, "step": 1, "nonfinite_steps": 0}
    torch.save({"state_dict": state, "flowanchor": meta}, tmp_path / "teacher.ckpt")
    with defer_loading():
        deferred = CheckpointVelocity(str(tmp_path / "teacher.ckpt"), dtype="auto", precision="bf16-mixed")
    assert is_deferred(deferred.network)
    materialise(deferred.network, torch.device("cpu"))
    at_once = CheckpointVelocity(str(tmp_path / "teacher.ckpt"), dtype="bfloat16")
    for (name, p), q in zip(deferred.network.named_parameters(), at_once.network.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
    assert torch.equal(velocity(deferred.network), velocity(network))
