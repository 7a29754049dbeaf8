"""What FSDP2, the strategy and Lightning do only on a GPU, without one (pretended.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flowanchor.base.rank_zero import rank_zero_only
from flowanchor.interfaces import Backbone, Batch
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.jvp.full import TORCH
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.strategies import ChainJVPStrategy, chain_jvp
from flowanchor.strategies.chain_jvp import average_plain_gradients
from flowanchor.strategies.sharding import shard_backbone
from flowanchor.text.base import Tokens

from .pretended import as_on_a_gpu, cuda_without_a_card

DIT: dict[str, Any] = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
}
WAN: dict[str, Any] = {
    "preset": "nano", "in_channels": 1, "height": 8, "width": 8, "num_layers": 2, "text_dim": 12, "text_len": 6,
}  # fmt: skip


class OneSide(WanExperts):
    """Times without values cannot tell which expert is asked."""

    def expert(self, t: Tensor) -> Wan:
        return self.low


NETWORKS: dict[str, Any] = {
    "LightningDiT": lambda: LightningDiT(num_classes=5, **DIT),
    "SiT": lambda: SiT(num_classes=5, **DIT),
    "Wan": lambda: Wan.from_preset(**WAN),
    "WanExperts": lambda: OneSide(**WAN),
}
ENGINES = {
    "Chain": Chain(),
    "selective": Chain("selective"),
    "graph": Chain(False),
    "TwoPass": TwoPass(),
    "checkpointed": TwoPass(checkpoint=True),
    "Full": Full(),
    "FiniteDifference": FiniteDifference(),
}


def made(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    network: Backbone = NETWORKS[name]()
    for p in network.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return network


def step(student: Backbone, teacher: Backbone, engine: Any, device: str = "cpu", low: bool = False) -> Tensor:
    """A loss of FACM with a guided teacher."""
    draw = torch.Generator().manual_seed(1)
    x1, noise = torch.randn(2, 2, *student.sample_shape, generator=draw).to(device)
    if student.conditioning.classes:
        cond = torch.randint(0, 5, (2,), generator=draw)
    else:
        cond = Tokens(torch.randn(2, 6, 12, generator=draw))
    t = torch.tensor([0.2, 0.7]).to(device)
    objective = ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), ConsistencyShortcut())
    velocity = CheckpointVelocity.of_network(teacher, Guidance(1.75, 0.125, 1.0))
    with torch.autocast(device, torch.bfloat16, enabled=low):
        return objective(
            student, Batch(x1, tree_map(lambda part: part.to(device), cond)), velocity, engine, noise, t
        ).loss


@pytest.fixture
def alone():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_root_is_given_inputs_to_move(engine, alone, monkeypatch):
    """On a GPU FSDP2 moves the inputs of a network's root, and torch 2.11 fails where there are none."""
    if engine == "Full" and TORCH < (2, 13):
        pytest.skip("refused under FSDP2 there")
    wanted = made("LightningDiT")
    step(wanted, made("LightningDiT", 1), ENGINES[engine]).backward()
    student, teacher = made("LightningDiT"), made("LightningDiT", 1)
    for network in (student, teacher):
        shard_backbone(network, alone)
    given = as_on_a_gpu(monkeypatch)
    step(student, teacher, ENGINES[engine]).backward()
    assert len(given) >= 2 and all(given), "student and teacher, each with inputs"
    for (name, p), q in zip(student.named_parameters(), wanted.parameters(), strict=True):
        if q.grad is not None:
            assert isinstance(p.grad, DTensor), name
            allowed = 1e-2 if engine == "FiniteDifference" else 1e-5  # a difference quotient magnifies rounding
            assert (p.grad.full_tensor() - q.grad).norm() <= allowed * q.grad.norm(), name


class Devices(TorchDispatchMode):
    """Where the tensors with dimensions are that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim and func.namespace == "aten":
            self.found.add(out.device.type)
        return out


# Wan in float32 is left out: diffusers writes its rotary positions in place, where tensors without values lose their
# device; and DiT, which reads its noise from a table of numpy. Both experts are Wan.
@pytest.mark.parametrize(
    ("network", "low"),
    [
        ("LightningDiT", False),
        pytest.param("LightningDiT", True, marks=pytest.mark.slow),
        ("SiT", True),
        pytest.param("Wan", True, marks=pytest.mark.slow),
        ("WanExperts", True),
    ],
)
def test_a_sharded_forward_stays_on_its_device(network, low, monkeypatch):
    """FSDP2's own branch for GPUs, and every operator of teacher, anchor and shortcut on one device."""
    with torch.device("meta"):
        networks = [NETWORKS[network]() for _ in range(2)]
    with cuda_without_a_card(monkeypatch, 2) as mesh:
        for one in networks:
            one._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device="cuda"))
            shard_backbone(one, mesh, param_dtype=torch.bfloat16 if low else None)
        with Devices() as devices:
            loss = step(*networks, Chain(attention="math"), "cuda", low)
        assert loss.device.type == "cuda" and loss.requires_grad
    assert "cuda" in devices.found


# ------------------------------------------------------------------------------------------- the strategy's own part


def test_a_process_takes_its_own_card_before_it_joins(monkeypatch):
    """NCCL, and the collectives that carry objects, use the card that is set: it is, first, and the group is bound."""
    called: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(("set_device", device)))
    monkeypatch.setattr("lightning.pytorch.accelerators.cuda._check_cuda_matmul_precision", lambda device: None)
    monkeypatch.setattr(
        "lightning.pytorch.strategies.model_parallel._init_dist_connection",
        lambda environment, backend, **settings: called.append((backend, settings["device_id"])),
    )
    monkeypatch.setattr(chain_jvp, "init_device_mesh", lambda kind, shape, **names: called.append((kind, shape)))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # the strategy sets it to 3
    from lightning.pytorch.accelerators import CUDAAccelerator
    from lightning.pytorch.plugins.environments import LightningEnvironment

    strategy = ChainJVPStrategy(replicate=2)
    strategy._accelerator = CUDAAccelerator()
    strategy.cluster_environment = LightningEnvironment()
    strategy.parallel_devices = [torch.device("cuda", n) for n in range(4)]
    strategy.cluster_environment.set_world_size(4)
    monkeypatch.setattr(strategy.cluster_environment, "local_rank", lambda: 3)
    strategy._lightning_module = nn.Module()  # type: ignore[assignment]
    strategy.setup_environment()
    mine = torch.device("cuda", 3)
    assert called == [("set_device", mine), ("nccl", mine), ("cuda", (2, 2))]


class Reads(TorchDispatchMode):
    """Counts what would make a GPU's queue run dry: values that the host asks for, and tensors made from its lists."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, own = 0, Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.count += 1
            return own(tensor)

        patch.setattr(Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.lift_fresh)
        return func(*args, **(kwargs or {}))


def test_averaging_waits_for_no_value_unless_a_gradient_is_missing(monkeypatch):
    module = nn.Linear(3, 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda joint: joint.mul_(2))  # the other process has the same
    for p in module.parameters():
        p.grad = torch.full_like(p, 3.0)
    with Reads(monkeypatch) as reads:
        average_plain_gradients(module)
    assert reads.count == 0
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in module.parameters())
    module.bias.grad = None  # here alone, or everywhere: the others must be asked
    with Reads(monkeypatch) as reads:
        average_plain_gradients(module)
    assert reads.count == 1 and module.bias.grad is None
    monkeypatch.setattr(dist, "all_reduce", lambda joint: joint.add_(torch.ones_like(joint)))
    average_plain_gradients(module)
    assert torch.equal(module.bias.grad, torch.full((2,), 0.5)), "one process used it, and had ones"
