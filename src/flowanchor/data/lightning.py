"""A data module as Lightning wants one. Apart, because programs that do not train never import Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from flowanchor.data.base import FlowDataModule


class LightningData(LightningDataModule):
    """`trainer.fit(module, datamodule=LightningData(data))`."""

    def __init__(self, data: FlowDataModule) -> None:
        super().__init__()
        self.data = data

    def prepare_data(self) -> None:
        """Once per machine, by one process."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """On every process: the data learns its share from the trainer."""
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def train_dataloader(self) -> Any:
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()


def data_of(trainer: Trainer) -> Any:
    """What a trainer was given: the data module itself, where it was wrapped; None for loaders alone."""
    given = getattr(trainer, "datamodule", None)  # Lightning sets it only where it was given one
    return given.data if isinstance(given, LightningData) else given
