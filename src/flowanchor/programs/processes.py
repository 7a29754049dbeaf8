"""The processes of one program under torchrun: which one this is, and waiting for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from flowanchor.base.processes import this_process
from flowanchor.programs.checks import own_device

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, of how many, and its device."""

    index: int = 0
    count: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str | None) -> Processes:
        """As torchrun's environment says; one process without it. Each gets a GPU of its own."""
        index, count = this_process()
        if count > 1 and not dist.is_initialized():
            # A day: processes wait for the slowest one, and torchrun ends them all when one fails.
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return cls(index, count, own_device(device))

    @property
    def first(self) -> bool:
        return self.index == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before the others do: what it stores, they find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def agree(self, value: T) -> T:
        """The first process' value, everywhere."""
        if self.count == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
