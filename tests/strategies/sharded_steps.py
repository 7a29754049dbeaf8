"""A program for one of N gloo processes: a few FACM steps with a guided teacher, sharded, written down as JSON.

    python sharded_steps.py RANK WORLD STORE RESULT SETTINGS

It also counts, in the last step, the collectives and the bytes of whole (gathered) parameters at every operation.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowanchor import jvp
from flowanchor.interfaces import Batch
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.arctan_lognormal import ArctanLogNormal
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity

BATCH, STEPS = 8, 2


def network(seed: int) -> LightningDiT:
    torch.manual_seed(seed)
    switches = {
        "disable_label_dropout": True,
        "use_qknorm": True,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
    }
    made = LightningDiT(4, 2, 3, hidden_size=16, depth=4, num_heads=2, num_classes=5, **switches)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def fsdp_parameters(module: torch.nn.Module) -> list[Any]:
    groups = []
    for unit in module.modules():
        if hasattr(unit, "_get_fsdp_state"):
            state = unit._get_fsdp_state()
            groups += getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [p for group in {id(g): g for g in groups if g is not None}.values() for p in group.fsdp_params]


FILLS = ("aten::split_with_sizes_copy", "aten::copy_")


class WholeBytes(TorchDispatchMode):
    """The largest number of bytes of whole parameters at any operation, over all networks together."""

    def __init__(self, *networks: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = [p for network in networks for p in fsdp_parameters(network)]
        self.peak = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives[func._schema.name.removeprefix("c10d::")] += 1
        elif func.namespace == "aten" and func._schema.name not in FILLS:
            return out  # parameters become whole where a gathered buffer is taken apart, and nowhere else
        whole = [p._unsharded_param for p in self.parameters if hasattr(p, "_unsharded_param")]
        self.peak = max(self.peak, sum(p.untyped_storage().size() for p in whole))
        return out


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def run(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    student, teacher = network(0), network(1)
    low = settings.get("bf16", False)
    if world > 1 or settings.get("shard"):
        from flowanchor.strategies.sharding import shard_backbone

        replicas = settings.get("replicas", 1)
        shape, names = (
            ((replicas, world // replicas), ("replicate", "shard")) if replicas > 1 else ((world,), ("shard",))
        )
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if low else {}
        teacher.requires_grad_(False)
        for one in (student, teacher):
            shard_backbone(one, mesh, prefetch=settings.get("prefetch", True), **policy)
    velocity = CheckpointVelocity.of_network(teacher, Guidance(1.75, 0.125, 1.0))
    objective = ComposedObjective(ExpandedInterval(), ArctanLogNormal(), FlowMatchingAnchor(), ConsistencyShortcut())
    engine = getattr(jvp, settings["engine"])(**settings.get("options", {}))
    if settings.get("separate"):
        joint = engine
        engine = lambda *given: [joint(*given[:-1], [one])[0] for one in given[-1]]  # noqa: E731 - a walk each
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)  # an operation for all of them
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    losses, first = [], {}
    held = WholeBytes(student, teacher)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        x1, noise = torch.randn(2, BATCH, 3, 4, 4, generator=draw)
        t, labels = torch.rand(BATCH, generator=draw), torch.randint(0, 5, (BATCH,), generator=draw)
        batch = Batch(x1[mine], labels[mine])
        counting = step == STEPS - 1 and world > 1  # FSDP2 learns the order of its stages in the first
        with torch.autocast("cpu", torch.bfloat16, enabled=low), held if counting else nullcontext():
            result = objective(student, batch, velocity, engine, noise[mine], t[mine])
            result.loss.backward()
        if step == 0:
            first = {n: whole(p.grad).flatten().tolist() for n, p in student.named_parameters() if p.grad is not None}
        loss = result.loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(float(loss) / world)
        optimizer.step()
        optimizer.zero_grad()
    sizes = [sum(p.numel() for m in stage for p in m.parameters()) for stage in network(0).stage_modules()]
    return {
        "losses": losses,
        "gradients": first,
        "parameters": {n: whole(p.detach()).flatten().tolist() for n, p in student.named_parameters()},
        "collectives": dict(held.collectives),
        "peak": held.peak,
        "stages": [4 * size for size in sizes],
    }


def main() -> None:
    rank, world, store, result, settings = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    found = {name: run(int(rank), int(world), given) for name, given in json.loads(settings).items()}
    if int(rank) == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
