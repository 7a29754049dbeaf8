"""Encoded images in the released layout: what `encode.py format=safetensors` writes, or the authors' own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flowanchor.data.base import FlowDataModule
from flowanchor.data.encoded import (
    BadSamples,
    StoredLatents,
    check_labels,
    read_description,
    read_statistics,
)
from flowanchor.data.latent_files import LatentFiles
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Batch


class LatentsDataModule(FlowDataModule):
    """Latents [C, h, w], normalised, read batch by batch from memory-mapped files.

    In every pass each sample is shown once, plain or mirrored by a fair coin of (seed, pass, sample), as the released
    loader does; latents stored as moments are drawn anew.

    Args:
        root: the folder of `*.safetensors` files.
        channels, size: of a latent: C, and h = w.
        num_classes: 0 to train without labels.
        flips: whether mirrored latents are shown too.
        values: `sample` or `moments`; None: as the manifest says, without one `sample`.
        statistics: `latents_stats.pt`, numbers (`{multiplier: 0.18215}`), or None: the file beside the latents.
        heldout: how many samples, drawn by a fixed seed, are held out for a validation loss.
        max_bad: samples with values that are not finite that are left out before training stops.

    Raises:
        ConfigError: no root, or settings that contradict the manifest.
        DataError: files that are missing, truncated or of another shape, labels out of range, statistics of others.
    """

    random_views = True

    def __init__(
        self,
        root: str | None,
        channels: int,
        size: int,
        num_classes: int,
        flips: bool = True,
        values: str | None = None,
        statistics: Any = None,
        heldout: int = 0,
        max_bad: int = 0,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if not root:
            raise ConfigError("data=latents needs to know the folder: add data.root=FOLDER (python src/encode.py).")
        if heldout < 0 or max_bad < 0:
            raise ConfigError(f"data.heldout={heldout} and data.max_bad={max_bad} must be at least 0.")
        self.root = Path(root).expanduser()
        self.name = self.root.resolve().name
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.flips, self.heldout, self.max_bad = flips, heldout, max_bad
        self.manifest, values = read_description(self.root, channels, size, num_classes, values, "safetensors")
        self.class_names = self.manifest.class_names if self.manifest else ()
        self.encoded_by = self.manifest.codec if self.manifest else {}
        self.statistics = read_statistics(statistics, self.root, channels)
        self.stored = StoredLatents((channels, size, size), values, self.statistics, self.seed)
        self._files: LatentFiles | None = None
        self._examples: dict[str, LatentBatches] = {}

    def examples(self, split: str) -> Dataset:
        if not self._examples:
            files = self.files()
            order = np.random.default_rng(0).permutation(len(files))
            rows = {"heldout": np.sort(order[: self.heldout]), "train": np.sort(order[self.heldout :])}
            self._examples = {
                name: LatentBatches(files, part, self.stored, self.flips, self.num_classes > 0, self.max_bad)
                for name, part in rows.items()
            }
        return self._examples[split]

    def files(self) -> LatentFiles:
        """The files, checked against the settings."""
        if self._files is None:
            expected = [shard.file for shard in self.manifest.shards] if self.manifest else []
            files = LatentFiles(self.root, expected)
            self.stored.check_shape(files.shape, files.paths[0])
            if self.flips and not files.flips:
                raise DataError(f"{self.root} holds no mirrored latents ('latents_flip'): add data.flips=false.")
            check_labels(files.labels, self.num_classes, files.name)
            if self.heldout >= len(files):
                raise ConfigError(f"data.heldout={self.heldout} leaves none of {len(files)} samples to train on.")
            some = np.linspace(0, len(files) - 1, min(256, len(files))).astype(np.int64)
            self.stored.check_statistics(files.read(some, np.zeros(len(some), dtype=bool)), self.root)
            self._files = files
        return self._files

    def val_dataloader(self) -> DataLoader | list[Any]:
        """The held-out samples, plain and in order; nothing where none are held out."""
        return super().val_dataloader() if self.heldout else []


class LatentBatches(Dataset):
    """Rows of the files as training examples, under the indices of `EpochBatchSampler(views=True)`."""

    def __init__(
        self, files: LatentFiles, rows: np.ndarray, stored: StoredLatents, flips: bool, labelled: bool, max_bad: int
    ) -> None:
        self.files, self.rows, self.stored = files, rows, stored
        self.flips, self.labelled = flips, labelled
        self.bad = BadSamples(max_bad)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        view, position = np.divmod(np.asarray(indices, dtype=np.int64), len(self.rows))
        number_of_pass, coin = np.divmod(view, 2)
        rows = self.rows[position]
        flipped = (coin == 1) & self.flips
        values = self.files.read(rows, flipped)
        labels = self.files.labels[rows]
        self.bad.mend(values, labels, lambda row: f"{self.files.name(int(rows[row]))} is not finite")
        samples = self.stored.samples(values, rows, 2 * number_of_pass + flipped)
        return Batch(samples, torch.from_numpy(labels) if self.labelled else None)
