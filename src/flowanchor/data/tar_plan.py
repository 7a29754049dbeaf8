"""Which reader reads which samples of a set of tars, and in which order: a pure function of seed and epoch.

A tar is read from its start, so readers get contiguous stretches of the samples, and a sample is moved no further than
a window. Shards come in a new order in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from flowanchor.data.epoch_sampler import whole_steps
from flowanchor.errors import DataError


@dataclass(frozen=True)
class Stretch:
    """What one reader reads in one epoch.

    Attributes:
        shards: all shards in this epoch's order.
        start, stop: its stretch of the samples in that order.
        order: [stop - start] the positions within the stretch in the order in which they are trained on.
        coins: [stop - start] 0 or 1 for each position: plain or mirrored.
    """

    shards: np.ndarray
    start: int
    stop: int
    order: np.ndarray
    coins: np.ndarray


class TarPlan:
    """Every sample once per epoch over all processes and their workers, but for what does not fill an optimizer step.

    Batch `i` of a process is read by its reader `i % readers`. What is left out (fewer than `batch_size * world_size *
    accumulate` samples) is others in every epoch: a step that spans two epochs would have the tars read anew from
    their start in the middle of a pass. Data with fewer batches than a step is passed over several times for one.

    Args:
        counts: samples per shard.
        batch_size: samples per process and batch.
        rank, world_size: this process, and how many there are.
        readers: loader workers of a process, at least 1.
        window: how far, in samples, a sample may be moved within its stretch.
        seed: of everything.
        accumulate: batches per optimizer step.

    Raises:
        DataError: fewer samples than a joint batch.
    """

    def __init__(
        self,
        counts: list[int],
        batch_size: int,
        rank: int,
        world_size: int,
        readers: int,
        window: int,
        seed: int,
        accumulate: int = 1,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.readers, self.window, self.seed = readers, window, seed
        self.batches = int(self.counts.sum()) // (batch_size * world_size)
        if self.batches == 0:
            raise DataError(
                f"A batch of {batch_size * world_size} ({batch_size} on each of {world_size} processes) is larger than "
                f"the data, {int(self.counts.sum())} samples: use a smaller data.batch_size."
            )
        self.length = whole_steps(self.batches, accumulate)  # of what a loader gives at a time
        self.batches = min(self.batches, self.length)

    def stretch(self, epoch: int, reader: int) -> Stretch:
        """What one reader of this process reads in an epoch."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        own = [len(range(r, self.batches, self.readers)) for r in range(self.readers)]  # batches of each reader
        start = (self.rank * self.batches + sum(own[:reader])) * self.batch_size
        length = own[reader] * self.batch_size
        draw = np.random.default_rng((self.seed, epoch, self.rank, reader))
        order = np.argsort(np.arange(length) + draw.random(length) * self.window, kind="stable")
        return Stretch(shards, start, start + length, order, draw.integers(0, 2, length))

    def work(self, position: int, worker: int) -> Iterator[tuple[int, int, int, int]]:
        """What a loader's worker makes once `position` batches of the training are done.

        A loader takes batches from its workers in turn, the first from worker 0. `length` batches are made, across the
        end of an epoch if need be. Yields epoch, reader, its first batch, how many.
        """
        numbers = range(position + worker, position + self.length, self.readers)
        for epoch, group in groupby(numbers, key=lambda number: number // self.batches):
            indices = [number % self.batches for number in group]
            yield epoch, indices[0] % self.readers, indices[0] // self.readers, len(indices)
