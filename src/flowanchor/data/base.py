"""What every data module shares: loaders of `Batch`es whose order can be resumed, and `ImageSet`s for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from flowanchor.data.epoch_sampler import BatchLoader, EpochBatchSampler, ResumableLoader
from flowanchor.data.images import ImageBatches, ImageSet
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import ConfigError

SPLITS = ("train", "heldout")


class FlowDataModule:
    """Images [C, H, W] in [-1, 1], with or without labels, from a train and a held-out split.

    A subclass sets `name`, `channels`, `size`, `num_classes` and `class_names`, and implements `load`; one that holds
    no images, `examples` instead. Lightning takes it as `LightningData(data)` (`flowanchor.data.lightning`), in a
    trainer built with `use_distributed_sampler=False`: the loaders shard by rank themselves.

    Args:
        batch_size: samples per process.
        num_workers: loader processes (0: load in the training process).
        pin_memory: page-locked batches, for training on a GPU.
        drop_last: leave out the incomplete last batch of an epoch (training only).
        repeat: passes over the data per epoch, see `EpochBatchSampler`.
        seed: of the order of the training samples.

    Attributes:
        name: short name of the data set, as in `FD-<name>`.
        channels, size: of a sample in the network's space (height = width = size).
        num_classes: 0 where the network gets no labels.
        class_names: one per class.
        mirror: whether mirrored copies are trained on, too.
        null_condition: what stands for no text, the condition of one sample; None: labels, or nothing.
        statistics: of encoded data: what normalises its latents, and is written into the codec's settings; else None.
        encoded_by: name and digest of the codec that encoded data were made by; empty for images.
        random_views: whether what is shown of a sample is drawn anew in every pass (`EpochBatchSampler.views`).
        trainer: who trains on it; None: nobody, as in an evaluation.
    """

    name: str = "data"
    channels: int
    size: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    mirror: bool = False
    random_views: bool = False
    null_condition: Any = None
    statistics: LatentStatistics | None = None
    encoded_by: Mapping[str, str] = MappingProxyType({})
    trainer: Any = None

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = True,
        repeat: int = 1,
        seed: int = 0,
    ) -> None:
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory
        self.drop_last, self.repeat, self.seed = drop_last, repeat, seed
        self._images: dict[str, ImageSet] = {}

    def fixed_prompts(self, count: int) -> Mapping[str, Any]:
        """The first different captions, `count` at most, each with its condition; empty for data without text."""
        return {}

    def load(self) -> dict[str, ImageSet]:
        """The image sets of the splits `train` and `heldout`; raises `DataError` where they cannot be had.

        Data that holds no images implements `examples` instead, and cannot be what an evaluation compares with.
        """
        raise ConfigError(
            "Encoded data holds no images to compare with: add reference=FOLDER (images) or reference=FILE.npz "
            "(statistics)."
        )

    def prepare_data(self) -> None:  # noqa: B027 - most data is there
        """Fetch what is missing, if that was asked for; by one process of each machine."""

    def images(self, split: str) -> ImageSet:
        """The images of `train` or `heldout`; held-out images are interleaved by class."""
        if split not in SPLITS:
            raise ConfigError(f"There is no split '{split}': use one of {', '.join(SPLITS)}.")
        if not self._images:
            self._images = self.load()
        return self._images[split]

    def examples(self, split: str) -> Dataset:
        """What the loaders read: a dataset whose `__getitems__(indices)` gives a whole `Batch`."""
        mirror = self.mirror and split == "train"
        return ImageBatches(self.images(split), labelled=self.num_classes > 0, mirror=mirror)

    def setup(self, stage: str | None = None) -> None:
        """Read the data and check that there is a batch to train on."""
        self.examples("train")
        if stage in (None, "fit"):
            self._train_order()

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; after a resume, those that an uninterrupted run would have seen next."""
        return self._loader("train", self._train_order(), position=self._batches_trained)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook, on the CPU."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook, on the device."""
        return batch

    def val_dataloader(self) -> DataLoader | list[Any]:
        """The held-out samples in order, all of them."""
        rank, world_size = self._process()
        length = len(cast(Sized, self.examples("heldout")))
        order = EpochBatchSampler(
            length, self.batch_size, rank=rank, world_size=world_size, drop_last=False, shuffle=False
        )
        return self._loader("heldout", order)

    def _train_order(self) -> EpochBatchSampler:
        rank, world_size = self._process()
        return EpochBatchSampler(
            len(cast(Sized, self.examples("train"))),
            self.batch_size,
            self.seed,
            rank,
            world_size,
            repeat=self.repeat,
            drop_last=self.drop_last,
            views=self.random_views,
            accumulate=self._accumulated(),
        )

    def _loader(self, split: str, order: EpochBatchSampler, position: Any = None) -> DataLoader:
        loader = BatchLoader if position is None else ResumableLoader
        return loader(
            self.examples(split),
            batch_sampler=order,
            num_workers=self.num_workers,
            pin_memory=self.pins,
            persistent_workers=self.num_workers > 0,
            **({} if position is None else {"position": position}),
        )

    @property
    def pins(self) -> bool:
        """Whether batches are page-locked: asked for, and of use on this machine."""
        return self.pin_memory and torch.cuda.is_available()

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _accumulated(self) -> int:
        """Batches per optimizer step."""
        return 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    def _batches_trained(self) -> int:
        if self.trainer is None:
            return 0
        # `processed` is what a checkpoint is consistent with: a batch counts once its optimizer step is done. The epoch
        # counter is no substitute: a run that is stopped by max_steps in the middle of an epoch counts that epoch.
        batches: int = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if self.trainer.overfit_batches:
            return batches % int(self.trainer.num_training_batches)  # the same few batches in every epoch
        return batches
