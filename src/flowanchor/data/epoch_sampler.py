"""The order of the samples: a pure function of the seed and of how many batches were trained on.

That makes a run resumable in the middle of an epoch, and makes two processes see, together, what one would see alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.data.workers import Telling, arriving, as_it_is
from flowanchor.errors import ConfigError, DataError, FlowAnchorError


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of indices; an epoch is `repeat` passes over the data, each with a permutation of its own.

    Global batch `b` (of `batch_size * world_size` indices) depends on `(seed, b)` alone. Rank `r` takes the `r`-th of
    `world_size` equal slices of it, so that the ranks' batches, put together, are one process's batch of that size.

    Args:
        length: number of samples.
        batch_size: samples per process.
        seed: of the permutations.
        rank, world_size: this process, and how many there are.
        repeat: passes per epoch (a tiny set does not pay the cost of starting an epoch so often).
        drop_last: leave out the incomplete batch at the end of an epoch; otherwise it is filled up, to a multiple of
            `world_size`, with indices from the start of the epoch, so that no rank runs out of batches before another.
        shuffle: False keeps the data's own order.
        views: what is yielded tells of the pass and of a fair coin, too: `index + length * (2 * pass + coin)`, for data
            that draws anew what it shows of a sample (mirrored or not, which draw from a posterior).
        accumulate: batches per optimizer step. The trainer ends a step where an iteration ends, so one holds whole
            steps only; the order of the batches does not depend on it.

    Raises:
        DataError: no data, or a global batch larger than the data with `drop_last`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: int = 1,
        drop_last: bool = True,
        shuffle: bool = True,
        views: bool = False,
        accumulate: int = 1,
    ) -> None:
        if batch_size < 1 or repeat < 1:
            raise ConfigError(
                f"data.batch_size={batch_size} and data.repeat={repeat} must both be at least 1: "
                "for example data.batch_size=128 data.repeat=1."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        if length < 1:
            raise DataError("The data set has no samples: choose another folder, or another data option.")
        if drop_last and batch_size * world_size > length:
            processes = f" ({batch_size} on each of {world_size} processes)" if world_size > 1 else ""
            raise DataError(
                f"A batch of {batch_size * world_size}{processes} is larger than the data, {length} samples, and "
                f"data.drop_last=true would leave no batch: use data.batch_size={max(1, length // world_size)} or "
                "less, or data.drop_last=false."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.repeat, self.drop_last, self.shuffle, self.views = repeat, drop_last, shuffle, views
        self.accumulate = accumulate
        self._position = 0

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all processes."""
        return self.batch_size * self.world_size

    @property
    def batches(self) -> int:
        """Batches per epoch, the same on every rank."""
        samples = self.length * self.repeat
        return samples // self.global_batch_size if self.drop_last else -(-samples // self.global_batch_size)

    def __len__(self) -> int:
        """Batches per iteration: an epoch's, down to whole optimizer steps; what is left comes in the next one."""
        return whole_steps(self.batches, self.accumulate)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of this epoch."""
        self.seek(epoch * self.batches)

    def seek(self, batches: int) -> None:
        """Start the next iteration after this many batches since the beginning of the training."""
        self._position = batches

    def __iter__(self) -> Iterator[list[int]]:
        """`len(self)` batches from the current position on, across the end of an epoch if need be."""
        order: np.ndarray | None = None
        for position in range(self._position, self._position + len(self)):
            epoch, index = divmod(position, self.batches)
            if order is None or index == 0:
                order = self._epoch_order(epoch)
            yield self._share(order, index)

    def _epoch_order(self, epoch: int) -> np.ndarray:  # [length * repeat]
        if not self.shuffle:
            return np.tile(np.arange(self.length), self.repeat)
        passes = range(epoch * self.repeat, (epoch + 1) * self.repeat)
        return np.concatenate([self._pass_order(p) for p in passes])

    def _pass_order(self, number: int) -> np.ndarray:  # [length]
        draw = np.random.default_rng((self.seed, number))
        order = draw.permutation(self.length)
        return order + self.length * (2 * number + draw.integers(0, 2, self.length)) if self.views else order

    def _share(self, order: np.ndarray, index: int) -> list[int]:
        batch = order[index * self.global_batch_size : (index + 1) * self.global_batch_size]
        share = -(-len(batch) // self.world_size)
        missing = share * self.world_size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.resize(order, missing)])
        return batch[self.rank * share : (self.rank + 1) * share].tolist()


def whole_steps(batches: int, accumulate: int) -> int:
    """A number of batches, down to a multiple of those of an optimizer step; at least one step."""
    return max(batches // accumulate, 1) * accumulate


class BatchLoader(DataLoader):
    """A `DataLoader` of a dataset whose `__getitems__(indices)` gives a whole batch, in a batch sampler's order."""

    def __init__(self, dataset: Any, **kwargs: Any) -> None:
        super().__init__(Telling(dataset), collate_fn=as_it_is, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from arriving(super().__iter__())
        except FlowAnchorError:
            self._iterator = None  # and with it its workers, which would wait for another pass
            raise


class ResumableLoader(BatchLoader):
    """A `BatchLoader` over an `EpochBatchSampler` that starts where the training stands.

    Lightning restores its counters on resume but leaves it to the loader to leave out the batches that were trained on
    already. It may also create the iterator before it has restored them. So the position is asked for when the first
    batch is fetched: `position()` is the number of batches that training has used so far, over all epochs.
    """

    def __init__(self, dataset: Any, *, position: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._order.seek(self.position())
        yield from super().__iter__()

    @property
    def _order(self) -> EpochBatchSampler:
        assert isinstance(self.batch_sampler, EpochBatchSampler)
        return self.batch_sampler

    def state_dict(self) -> dict[str, int | bool]:
        """What the order depends on; its presence also tells Lightning that the loader can resume."""
        order = self._order
        return {
            "samples": order.length,
            "global_batch_size": order.global_batch_size,
            "seed": order.seed,
            "repeat": order.repeat,
            "drop_last": order.drop_last,
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Warn where a resumed run cannot see the batches that an uninterrupted one would have seen."""
        warn_of_another_order(state, self.state_dict())


def warn_of_another_order(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where what the order depends on has changed since the checkpoint."""
    changed = {k: (before[k], v) for k, v in now.items() if k in before and before[k] != v}
    if changed:
        listed = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
        rank_zero_warn(f"The resumed run will not see the batches of an uninterrupted one ({listed}).")
