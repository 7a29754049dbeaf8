"""The checkpoint that a run resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`, always under that name: rewritten every `every_n_train_steps`, and when training ends.

    Lightning's own `save_last` follows the checkpoints of a monitored metric, and a run that ends between two of its
    steps would leave an older one behind. The file is replaced in one move, so a killed run never leaves half of it.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 100, filename: str = "last", **options: Any) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            save_top_k=1,
            every_n_train_steps=every_n_train_steps,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            **options,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path) == self._file:
            self._last_global_step_saved = trainer.global_step  # what was resumed from is not written again

    @property
    def _file(self) -> Path:
        return Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> bool:
        """Write `last.ckpt`, on all processes, unless it is that of this step already; returns whether it now is."""
        if trainer.global_step != self._last_global_step_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        return trainer.global_step == self._last_global_step_saved
