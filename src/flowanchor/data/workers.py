"""What comes out of a loader's worker processes: batches through shared memory, and errors as sentences.

PyTorch moves a batch into shared memory in a thread of the worker. Where there is no room for it (Docker gives 64 MB),
that thread prints a traceback and goes on, and the batch is waited for for ever. Here the worker moves it there itself,
so that this error arrives as all others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from flowanchor.errors import DataError, FlowAnchorError

Made = TypeVar("Made")

NO_ROOM = (
    "The workers that read the data cannot get shared memory for their batches ({}): give the container more (docker "
    "run --shm-size=8g), read in the process itself (num_workers=0, in training data.num_workers=0), or use a smaller "
    "batch_size."
)


class Failed:
    """A user's error on its way out of a worker process: raised there, it would arrive as a traceback."""

    def __init__(self, error: FlowAnchorError) -> None:
        self.error = error


def made(make: Callable[[], Made]) -> Made | Failed:
    """What `make` returns, in shared memory where this is a worker, or the error that it raised."""
    try:
        return shared(make())
    except FlowAnchorError as error:
        return Failed(error)


def shared(batch: Made) -> Made:
    """A batch with its tensors in shared memory, where this is a worker; raises `DataError` where there is no room."""
    if get_worker_info() is None:
        return batch
    try:
        for tensor in _tensors(batch):
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        raise DataError(NO_ROOM.format(str(error).rpartition(">: ")[2])) from error  # without the name of its file
    return batch


def arriving(batches: Iterable[Any]) -> Iterator[Any]:
    """What workers have made; raises what they could not make, when they have been ended.

    The error holds this frame, and so must the frame hold neither the error nor the loader's iterator: PyTorch waits
    five seconds for each worker whose queue was taken apart before it by the garbage collector.
    """
    try:
        for batch in batches:
            if isinstance(batch, Failed):
                error, batch, batches = batch.error, None, ()
                try:
                    raise error
                finally:
                    del error
            yield batch
    except RuntimeError as error:
        if "Bus error" in str(error):  # memory that was promised, and is not there
            raise DataError(NO_ROOM.format("bus error")) from error
        raise


def in_order(dataset: Dataset[Made], num_workers: int) -> Iterator[Made]:
    """The items of a dataset, each a batch already, in the order of their numbers."""
    return arriving(DataLoader(Telling(dataset), batch_size=None, num_workers=num_workers, collate_fn=as_it_is))


class Telling(Dataset[Any], Generic[Made]):
    """A dataset whose errors arrive as sentences; items are batches already."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return made(lambda: self.dataset[index])

    def __getitems__(self, indices: list[int]) -> Any:
        return made(lambda: self.dataset.__getitems__(indices))


def as_it_is(batch: Any) -> Any:
    """No collation."""
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, Mapping)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
