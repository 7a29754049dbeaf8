"""One process of a group: `python ranks.py RANK WORLD STORE '{...}'`, measuring sharded steps beside one that is not.

The group's processes run the same task together; the first one prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from counting import Collectives, allocator_peak
from facm import facm_parts
from flowanchor.interfaces import Answer, Backbone, Batch, Question
from flowanchor.jvp import Chain
from flowanchor.strategies.sharding import shard_backbone
from planning import NETWORKS, Setting, asked_teacher, facm_loss, kept, shard
from workloads import ENGINES, Workload


class OneByOne:
    """An engine without a joint walk: anchor and shortcut are asked one after the other."""

    def __init__(self, engine: Chain) -> None:
        self.engine = engine

    def __call__(self, backbone: Backbone, x: Tensor, cond: Any, questions: Sequence[Question]) -> list[Answer]:
        return [self.engine(backbone, x, cond, [question])[0] for question in questions]


def sharded_step(joint: bool, batch: int, **size: Any) -> Workload:
    """FACM's step with student and teacher sharded over all processes."""
    student, teacher, objective = facm_parts(**size)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard_backbone(student, mesh)
    shard_backbone(teacher.network, mesh)
    engine: Any = Chain() if joint else OneByOne(Chain())
    data = Batch(torch.randn(batch, *student.sample_shape), torch.randint(0, 10, (batch,)))
    return Workload(lambda: objective(student, data, teacher, engine).loss.backward(), student)


def whole_step(batch: int, **size: Any) -> Workload:
    """The same step in one process."""
    student, teacher, objective = facm_parts(**size)
    engine = Chain()
    data = Batch(torch.randn(batch, *student.sample_shape), torch.randint(0, 10, (batch,)))
    return Workload(lambda: objective(student, data, teacher, engine).loss.backward(), student)


def compare(batch: int, rounds: int, size: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of each round, summed over the processes, and the collectives of one step.

    `batch` samples in all: each process has its share, the single process has all of them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    cases = {
        "joint walk": sharded_step(True, batch // world, **size),
        "two walks": sharded_step(False, batch // world, **size),
    }
    alone = whole_step(batch, **size) if rank == 0 else Workload(lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in (*cases, "one process")}
    found: dict[str, Any] = {"seconds": seconds, "collectives": {}}
    for turn in range(rounds + 1):
        for name, work in (*cases.items(), ("one process", alone)):
            dist.barrier()
            with Collectives() as counted:
                spent = _cpu_seconds(work)
            if turn:
                seconds[name].append(spent)
            found["collectives"][name] = dict(counted.calls) | {f"{k}_bytes": v for k, v in counted.bytes.items()}
    return found


def peak(network: str, size: dict[str, Any], engine: str, setting: dict[str, Any]) -> list[int]:
    """What a sharded FACM step allocates at most on each process, in bytes, gradients included."""
    chosen = Setting(**setting)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    student, teacher = NETWORKS[network](**size), asked_teacher(NETWORKS[network](**size))
    kept([teacher], chosen)
    for built in (student, teacher):
        for tensor in (*built.parameters(), *built.buffers()):
            torch.nn.init.normal_(tensor.data, std=0.02)
        shard(built, mesh, chosen)
    loss = facm_loss(student, teacher, ENGINES[engine](), chosen)
    loss().backward()  # what is made once, in a first pass
    student.zero_grad(set_to_none=True)
    mine = torch.tensor(allocator_peak(lambda: loss().backward()))
    peaks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(peaks, mine)
    return [int(found) for found in peaks]


def _cpu_seconds(work: Workload) -> float:
    work.forget()
    start = time.process_time()
    work.step()
    total = torch.tensor(time.process_time() - start, dtype=torch.float64)
    dist.all_reduce(total)
    work.forget()
    return float(total)


def main() -> None:
    rank, world, store, task = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    measures: dict[str, Callable[..., Any]] = {"compare": compare, "peak": peak}
    measure = measures[task.pop("measure")]
    found = measure(**task)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    # Sharded modules still hold the group, whose threads must not meet the end of the interpreter.
    os._exit(0)


if __name__ == "__main__":
    main()
