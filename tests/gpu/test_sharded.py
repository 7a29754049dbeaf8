"""FSDP2 on one card, by NCCL: a sharded step is the plain one."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flowanchor.jvp import Chain, TwoPass
from flowanchor.strategies.sharding import shard_backbone

from .device import CUDA, DEVICE, autocast, batch_of, exactly, facm, gradient, needs_it, network, off, taught_by

pytestmark = needs_it


@pytest.fixture
def mesh():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if CUDA:
        torch.cuda.set_device(0)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl" if CUDA else "gloo", init_method=address, rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("engine", [Chain(), Chain("selective"), TwoPass(checkpoint=True)], ids=repr)
def test_a_sharded_step_equals_a_plain_one(engine, low, mesh):
    exactly()
    found = []
    for sharded in (False, True):
        student, teacher = network(), network(1)
        if sharded:
            for one in (student, teacher):
                policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if low else {}
                shard_backbone(one, mesh, **policy)
        batch, noise, t = batch_of(4, student)
        for _ in range(2):  # the second gathers what the first freed
            student.zero_grad()
            with autocast(low):
                facm()(student, batch, taught_by(teacher), engine, noise, t).loss.backward()
        found.append(gradient(student))
    assert off(*found) <= (2e-2 if low else 1e-5)
