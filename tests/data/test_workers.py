"""What workers cannot send ends the program with a sentence; what they send is shared memory already."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset

from flowanchor.data import workers
from flowanchor.data.epoch_sampler import BatchLoader
from flowanchor.data.workers import in_order
from flowanchor.errors import DataError
from flowanchor.interfaces import Batch


class Batches(Dataset):
    """Three batches; `x1` counts."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Batch(torch.full((4,), float(index)))

    def __getitems__(self, indices):
        return self[indices[0]]


def loaders(workers: int, data: type[Dataset] = Batches):
    yield in_order(data(), workers)
    yield iter(BatchLoader(data(), batch_sampler=[[0], [1], [2]], num_workers=workers))


@pytest.mark.parametrize("count", [0, 1])
def test_batches_arrive_in_order(count):
    for loader in loaders(count):
        batches = list(loader)
        assert [batch.x1.tolist() for batch in batches] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]
        assert all(batch.x1.is_shared() == bool(count) for batch in batches)


@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_without_shared_memory_is_a_sentence(monkeypatch, number):
    """In PyTorch's own thread it is printed, and the batch waited for for ever. Without workers none is asked for."""

    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    for loader in loaders(1):
        with pytest.raises(DataError, match=r"\(No space left on device \(28\)\).*--shm-size.*num_workers=0"):
            list(loader)
    for loader in loaders(0):
        assert len(list(loader)) == 3


class Bad(Batches):
    def __getitem__(self, index):
        raise DataError("This one cannot be read.")


def lasting(data: type[Dataset]):
    loader = BatchLoader(data(), batch_sampler=[[0], [1], [2]], num_workers=2, persistent_workers=True)
    yield from loader


@pytest.mark.parametrize("way", [0, 1, 2])
def test_an_error_leaves_no_worker_behind(way):
    """Not even for the garbage collector, which would have the loader wait five seconds for each of them."""
    gc.disable()
    try:
        with pytest.raises(DataError, match="This one"):
            list([*loaders(2, Bad), lasting(Bad)][way])
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_a_bus_error_is_the_same_sentence():
    def broken():
        yield 1
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    found = workers.arriving(broken())
    assert next(found) == 1
    with pytest.raises(DataError, match="--shm-size"):
        next(found)


SMALL = """
import torch
from flowanchor.data.workers import in_order
from flowanchor.errors import DataError

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, index):
        return torch.ones(1 << 20, dtype=torch.uint8)

try:
    batches = list(in_order(Large(), 1))
except DataError as error:
    print(error)
"""


def _may_mount() -> bool:
    asked = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "/dev/shm"]
    try:
        return (
            sys.platform == "linux" and os.geteuid() == 0 and subprocess.run(asked, capture_output=True).returncode == 0
        )
    except OSError:
        return False


@pytest.mark.skipif(not _may_mount(), reason="needs to mount a small /dev/shm")
@pytest.mark.cold
def test_a_small_shared_memory_does_not_hang():
    """Four of twenty batches fit; the fifth is refused by the system itself."""
    command = f'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "{sys.executable}" -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command, SMALL], capture_output=True, text=True, timeout=120, check=True
    )
    assert "--shm-size" in done.stdout and "Traceback" not in done.stderr, done.stderr
