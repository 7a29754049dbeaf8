"""Encoded captions (`encode.py data=captions`): latents of several sizes with their text."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowanchor.conditioning import batch_of
from flowanchor.data.base import FlowDataModule
from flowanchor.data.encoded import check_settings
from flowanchor.data.epoch_sampler import EpochBatchSampler
from flowanchor.encoded.captions import CaptionFile, read_negative
from flowanchor.encoded.manifest import MANIFEST, CaptionManifest
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Batch
from flowanchor.text.base import kind_of


class CaptionedDataModule(FlowDataModule):
    """`Batch(latents [B, C, F, h, w], texts)`, every batch of one size, over all processes.

    Texts are of the kind that their encoder gave: `Tokens` [B, L, D], or another of `flowanchor.text.base`.

    In a pass each sample is shown once, with one of its captions, drawn anew each time; of every size the samples that
    do not fill a global batch are left out, others in every pass. Texts are padded with zeros, at least to the length
    of the negative prompt's, which is `null_condition`.

    Args:
        root: the folder.
        channels, frames: of a latent.
        height, width: of the latents that are drawn for samples; any size may be trained on.
        text_dim: channels of the text embeddings.

    Raises:
        ConfigError: no root, or settings that contradict the manifest.
        DataError: a folder that is not complete, damaged files, no size with a whole batch.
    """

    random_views = True

    def __init__(
        self,
        root: str | None,
        channels: int,
        frames: int,
        height: int,
        width: int,
        text_dim: int,
        size: int = 0,
        num_classes: int = 0,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if not root:
            raise ConfigError("data=captions needs to know the folder: add data.root=FOLDER (python src/encode.py).")
        if num_classes:
            raise ConfigError(f"data.num_classes={num_classes}: captions have no classes: leave it out.")
        self.root = Path(root).expanduser()
        self.name = self.root.resolve().name
        self.channels, self.frames, self.height, self.width, self.size = channels, frames, height, width, height
        self.num_classes, self.text_dim = 0, text_dim
        manifest = CaptionManifest.read(self.root)
        if manifest is None:
            raise DataError(f"{self.root} holds no complete set: run python src/encode.py data=captions, it goes on.")
        self.manifest, self.encoded_by = manifest, manifest.codec
        expected = {
            "channels": (channels, manifest.shape[0]),
            "frames": (frames, manifest.shape[1]),
            "text_dim": (text_dim, manifest.text_width),
        }
        check_settings(expected, self.root / MANIFEST)
        self.null_condition = text_of(read_negative(self.root), self.root)
        self._examples: CaptionBatches | None = None

    def fixed_prompts(self, count: int) -> dict[str, Any]:
        """The first different captions of the data, `count` at most, with their texts."""
        examples = self.examples("train")
        assert isinstance(examples, CaptionBatches)
        found: dict[str, Any] = {}
        for file in examples.files:
            for row, captions in enumerate(file.texts()):
                if len(found) == count:
                    break
                if captions[0] not in found:
                    found[captions[0]] = text_of(file.text(row, 0), file.path)
        return found

    def examples(self, split: str) -> Dataset:
        if self._examples is None:
            self._examples = CaptionBatches(self.root, self.manifest, self.seed, self.null_condition)
        return self._examples

    def _train_order(self) -> EpochBatchSampler:
        rank, world_size = self._process()
        counts: dict[tuple[int, int], list[np.ndarray]] = {}
        first = 0
        for shard, size in zip(self.manifest.shards, self.manifest.sizes, strict=True):
            counts.setdefault(size, []).append(np.arange(first, first + shard.count))
            first += shard.count
        groups = {size: np.concatenate(rows) for size, rows in counts.items()}
        accumulate = self._accumulated()
        return GroupedSampler(groups, self.batch_size, self.seed, rank, world_size, self.repeat, accumulate)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Nothing: no samples are held out."""
        return []


class CaptionBatches(Dataset):
    """Samples of all files, under the indices of `EpochBatchSampler(views=True)`."""

    def __init__(self, root: Path, manifest: CaptionManifest, seed: int, null: Any) -> None:
        self.files = [CaptionFile(root / shard.file, shard.count) for shard in manifest.shards]
        self.starts = np.concatenate([[0], np.cumsum([shard.count for shard in manifest.shards])])
        self.seed, self.null = seed, null

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitems__(self, indices: list[int]) -> Batch:
        view, index = np.divmod(np.asarray(indices, dtype=np.int64), len(self))
        places = np.searchsorted(self.starts, index, side="right") - 1
        latents, texts = [], []
        for number_of_pass, sample, place in zip((view // 2).tolist(), index.tolist(), places.tolist(), strict=True):
            file, row = self.files[place], sample - int(self.starts[place])
            latents.append(file.latents([row]))
            caption = np.random.default_rng((self.seed, number_of_pass, sample)).integers(file.captions(row))
            texts.append(text_of(file.text(row, int(caption)), file.path))
        return Batch(torch.cat(latents), batch_of(texts, self.null))


def text_of(fields: Mapping[str, Tensor], path: Path) -> Any:
    """A text as the named tuple of its fields; raises `DataError` where files hold others."""
    try:
        return kind_of(fields)(**fields)
    except KeyError:
        raise DataError(
            f"{path} holds texts of {', '.join(fields)}, which this version does not know: encode again."
        ) from None


class GroupedSampler(EpochBatchSampler):
    """Global batches within one group of samples each, in a random order; what does not fill one is left out."""

    def __init__(
        self,
        groups: dict[tuple[int, int], np.ndarray],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.groups = groups
        total = sum(map(len, groups.values()))
        super().__init__(total, batch_size, seed, rank, world_size, repeat, views=True, accumulate=accumulate)
        joint = self.global_batch_size
        small = {f"{h} x {w}": len(rows) for (h, w), rows in groups.items() if len(rows) < joint}
        if len(small) == len(groups):
            raise DataError(
                f"No size has the {joint} samples of a batch over all processes (at most {max(small.values())}): use a "
                "smaller data.batch_size, or encode with a smaller captions.max_ratio."
            )
        if small:
            listed = ", ".join(f"{size}: {count}" for size, count in small.items())
            warnings.warn(f"Latents of these sizes are too few for a batch of {joint} and are never seen: {listed}.",
                          stacklevel=2)  # fmt: skip

    @property
    def batches(self) -> int:
        joint = self.global_batch_size
        return self.repeat * sum(len(rows) // joint for rows in self.groups.values())

    def _pass_order(self, number: int) -> np.ndarray:
        draw = np.random.default_rng((self.seed, number))
        joint = self.global_batch_size
        batches: list[np.ndarray] = []
        for rows in self.groups.values():
            order = draw.permutation(rows)
            batches += np.split(order[: len(order) // joint * joint], max(len(order) // joint, 1))
        batches = [batch for batch in batches if len(batch)]
        order = np.concatenate([batches[i] for i in draw.permutation(len(batches))])
        return order + self.length * 2 * number
