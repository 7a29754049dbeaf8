"""Encoded images in tars: what `encode.py format=webdataset` writes, on a disk or behind any URL webdataset opens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flowanchor.base.reading import shown
from flowanchor.data.base import FlowDataModule
from flowanchor.data.encoded import BadSamples, StoredLatents, read_description, read_statistics
from flowanchor.data.epoch_sampler import warn_of_another_order
from flowanchor.data.labels import read_label, shown_label
from flowanchor.data.tar_plan import TarPlan
from flowanchor.data.tar_reader import (
    TarSample,
    count_samples,
    decode_array,
    expand,
    is_remote,
    read_shard,
    read_stretch,
)
from flowanchor.data.workers import Failed, arriving, shared
from flowanchor.errors import ConfigError, DataError, FlowAnchorError
from flowanchor.interfaces import Batch


class WebDatasetDataModule(FlowDataModule):
    """Latents [C, h, w], normalised, streamed from tars of `<key>.npy` [F, C, h, w] and `<key>.cls`.

    Every sample once per epoch over all processes and workers, but for the rest that does not fill a joint batch;
    plain or mirrored by a fair coin; the order is a function of seed, epoch, processes and workers (`TarPlan`).

    Args:
        root: a folder of tars, or a path or URL with braces (`https://host/shard-{000000..000128}.tar`).
        channels, size: of a latent: C, and h = w.
        num_classes: 0 to train without labels.
        index: `index.json` of the tars, a path or URL; None: the one beside local tars, else their headers are read.
        flips: whether mirrored latents are shown too.
        values: `sample` or `moments`; None: as the manifest says, without one `sample`.
        statistics: `latents_stats.pt`, numbers, or None: the file beside local tars.
        window: how many samples a reader shuffles among each other.
        max_bad: samples (not finite, incomplete, with a label that is none) left out before training stops.

    Raises:
        ConfigError: no root, remote tars without an index, settings that contradict the manifest.
        DataError: tars that are missing or truncated, statistics of other latents.
    """

    def __init__(
        self,
        root: str | None,
        channels: int,
        size: int,
        num_classes: int,
        index: str | None = None,
        flips: bool = True,
        values: str | None = None,
        statistics: Any = None,
        window: int = 1000,
        max_bad: int = 0,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if not root:
            raise ConfigError(
                "data=webdataset needs to know the tars: add data.root=FOLDER, or a path or URL with braces."
            )
        if window < 1 or max_bad < 0:
            raise ConfigError(f"data.window={window} must be at least 1 and data.max_bad={max_bad} at least 0.")
        self.root, self.index = root.removeprefix("file:"), index
        self.folder = None if is_remote(self.root) else _folder_of(Path(self.root).expanduser())
        self.name = Path(root).name.partition(".")[0] if self.folder is None else self.folder.resolve().name
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.flips, self.window, self.max_bad = flips, window, max_bad
        self.manifest, values = read_description(self.folder, channels, size, num_classes, values, "webdataset")
        self.class_names = self.manifest.class_names if self.manifest else ()
        self.encoded_by = self.manifest.codec if self.manifest else {}
        self.statistics = read_statistics(statistics, self.folder, channels)
        self.stored = StoredLatents((channels, size, size), values, self.statistics, self.seed)
        self._tars: tuple[list[str], list[int]] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find and count the tars, look at the first samples, and check that there is a batch to train on."""
        urls, _ = self.tars()
        batches = self._batches()
        first = []
        for sample in islice(read_shard(urls[0]), 64):
            with suppress(_Fault):  # counted when it is trained on
                first.append(torch.from_numpy(batches.values(sample, 0).astype(np.float32)))
        if first:
            self.stored.check_statistics(torch.stack(first), urls[0])

    def tars(self) -> tuple[list[str], list[int]]:
        """The tars and how many samples each holds."""
        if self._tars is None:
            urls = expand(self.root)
            self._tars = (urls, count_samples(urls, self.index))
        return self._tars

    def train_dataloader(self) -> DataLoader:
        return TarLoader(
            self._batches(), position=self._batches_trained, num_workers=self.num_workers, pin_memory=self.pins
        )

    def val_dataloader(self) -> list[Any]:
        return []

    def _batches(self) -> TarBatches:
        urls, counts = self.tars()
        rank, world_size = self._process()
        readers, accumulate = max(1, self.num_workers), self._accumulated()
        plan = TarPlan(counts, self.batch_size, rank, world_size, readers, self.window, self.seed, accumulate)
        return TarBatches(urls, plan, self.stored, self.flips, self.num_classes, self.max_bad)


class TarBatches(IterableDataset):
    """The batches of one process from `position` on, shared among the workers of its loader."""

    def __init__(
        self, urls: list[str], plan: TarPlan, stored: StoredLatents, flips: bool, num_classes: int, max_bad: int
    ) -> None:
        self.urls, self.plan, self.stored = urls, plan, stored
        self.flips, self.num_classes = flips, num_classes
        self.bad = BadSamples(max_bad)
        self.position = 0

    def __len__(self) -> int:
        return self.plan.length

    def __iter__(self) -> Iterator[Batch | Failed]:
        worker = get_worker_info()
        try:
            for epoch, reader, first, count in self.plan.work(self.position, worker.id if worker else 0):
                yield from map(shared, self._read(epoch, reader, first, count))
        except FlowAnchorError as error:
            yield Failed(error)

    def _read(self, epoch: int, reader: int, first: int, count: int) -> Iterator[Batch]:
        stretch = self.plan.stretch(epoch, reader)
        size = self.plan.batch_size
        todo = stretch.order[first * size : (first + count) * size]
        needed = np.zeros(len(stretch.order), dtype=bool)
        needed[todo] = True
        samples = read_stretch(self.urls, self.plan.counts, stretch, needed)
        held: dict[int, TarSample] = {}
        for positions in todo.reshape(count, size).tolist():
            batch = []
            for position in positions:
                while position not in held:
                    read, sample = next(samples)
                    held[read] = sample
                batch.append(held.pop(position))
            yield self._batch(batch, epoch, stretch.coins[positions])

    def _batch(self, samples: list[TarSample], epoch: int, coins: np.ndarray) -> Batch:
        values = torch.empty(len(samples), *self.stored.stored_shape)
        labels = np.zeros(len(samples), dtype=np.int64)
        views = coins * self.flips
        faults: dict[int, str] = {}
        for row, (sample, view) in enumerate(zip(samples, views.tolist(), strict=True)):
            try:
                values.numpy()[row] = self.values(sample, view)
                labels[row] = self.label(sample)
            except _Fault as fault:
                faults[row] = str(fault)
                values[row] = float("nan")
        self.bad.mend(values, labels, lambda row: faults.get(row, f"{samples[row]} is not finite"))
        numbers = np.array([_number(sample.key) for sample in samples], dtype=np.int64)
        latents: Tensor = self.stored.samples(values, numbers, 2 * epoch + views)
        return Batch(latents, torch.from_numpy(labels) if self.num_classes else None)

    def values(self, sample: TarSample, view: int) -> np.ndarray:
        """[C, h, w] of one sample as stored; raises `DataError` where the whole set is another one."""
        if "npy" not in sample.files:
            raise _Fault(f"{sample} has no .npy (it has {', '.join(shown(f'.{name}') for name in sample.files)[:100]})")
        try:
            array = decode_array(sample.files["npy"])
        except ValueError as error:
            raise _Fault(f"{sample} has a damaged .npy ({error})") from error
        if not array.ndim or not len(array):
            raise _Fault(f"{sample} has an empty .npy")
        self.stored.check_shape(array.shape[1:], sample)
        if self.flips and len(array) < 2:
            raise DataError(f"{sample} holds no mirrored latents: add data.flips=false.")
        chosen: np.ndarray = array[view]
        return chosen

    def label(self, sample: TarSample) -> int:
        """The class of one sample, 0 without classes."""
        if not self.num_classes:
            return 0
        text = sample.files.get("cls", b"nothing")
        label = read_label(text)
        if label is None or label >= self.num_classes:
            raise _Fault(
                f"{sample} has label {shown_label(text)}, which is none of data.num_classes={self.num_classes}"
            )
        return label


class _Fault(Exception):
    """One sample that cannot be used."""


class TarLoader(DataLoader):
    """Makes the workers start where the training stands, see `ResumableLoader`."""

    def __init__(self, dataset: TarBatches, *, position: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=None, **kwargs)
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._batches.position = self.position()
        yield from arriving(super().__iter__())

    @property
    def _batches(self) -> TarBatches:
        assert isinstance(self.dataset, TarBatches)
        return self.dataset

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on; its presence also tells Lightning that the loader can resume."""
        plan = self._batches.plan
        return {
            "samples": int(plan.counts.sum()),
            "shards": len(plan.counts),
            "batch_size": plan.batch_size,
            "batches": plan.batches,
            "world_size": plan.world_size,
            "readers": plan.readers,
            "window": plan.window,
            "seed": plan.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn where a resumed run cannot see the batches that an uninterrupted one would have seen."""
        warn_of_another_order(state, self.state_dict())


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _number(key: str) -> int:
    """A number for the draws of a sample: its key, which encode.py writes as one, or a hash of it."""
    plain = key.isascii() and key.isdigit() and len(key) <= 18
    return int(key) if plain else zlib.crc32(key.encode(errors="surrogateescape"))
