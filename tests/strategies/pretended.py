"""A GPU that is not there: what PyTorch does only where the device is one, taken on a CPU.

`as_on_a_gpu`: FSDP2 treats its CPU as torch 2.11 treats a GPU, so that values can be compared. `cuda_without_a_card`:
tensors say that they are on a GPU and have no values, and FSDP2 takes its own branch for GPUs, up to the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import _fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_state
from torch.distributed.utils import _to_kwargs
from torch.testing._internal.distributed.fake_pg import FakeStore

PARTS = ("_fsdp_init", "_fsdp_state", "_fsdp_param_group", "_fsdp_collectives")


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Have the root of FSDP2 move its inputs as torch 2.11 does on a GPU; returns the inputs that it was given."""
    given: list[tuple[Any, ...]] = []
    own = _fsdp_state.FSDPState._root_pre_forward

    def root_pre_forward(self: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begins = self._state_ctx.iter_forward_root is None
        args, kwargs = own(self, module, args, kwargs)
        if not begins:
            return args, kwargs
        given.append(args)
        moved, named = _to_kwargs(args, kwargs, self._device, False)
        return moved[0], named[0]

    patch.setattr(_fsdp_state.FSDPState, "_root_pre_forward", root_pre_forward)
    return given


class _Handle:
    """`torch.cuda` as far as FSDP2 and meshes ask it, with the CPU's streams."""

    Stream = torch.cpu.Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1


class ShapesOnly(FakeTensorMode):
    """Real tensors may be compared: the engines look whether random numbers were drawn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default:
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def cuda_without_a_card(patch: pytest.MonkeyPatch, processes: int) -> Iterator[DeviceMesh]:
    """A mesh of GPUs, of which this process has the first; tensors made inside have no values."""
    state = torch.zeros(16, dtype=torch.uint8)
    for part in (*(getattr(_fully_shard, name) for name in PARTS), torch.distributed.device_mesh):
        patch.setattr(part, "_get_device_handle", lambda kind="cuda": _Handle())
    patch.setattr(torch.cuda, "get_rng_state", lambda device=None: state)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        mesh = init_device_mesh("cuda", (processes,))
        with ShapesOnly(allow_non_fake_inputs=True):
            yield mesh
    finally:
        dist.destroy_process_group()
