"""The checkpoints of a run: the one that it resumes from, and the best one; none is written from a bad state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from flowanchor.base.files import remove, superseded
from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.callbacks.attached import callbacks_of, is_trial
from flowanchor.checkpoints.lightning import use_run_checkpoints
from flowanchor.ema import EMA
from flowanchor.errors import NonFiniteLossError
from flowanchor.module import FlowModule, skipped_steps
from flowanchor.weights import all_finite


class SoundCheckpoint(ModelCheckpoint):
    """Writes nothing while steps are being skipped, and nothing that is not finite: what lies there stays."""

    refused = False  # whether the latest state that was due could not be saved

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        use_run_checkpoints(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self._every_n_train_steps
        if self._train_time_interval is None and (every < 1 or trainer.global_step % every):
            return  # not due; to find out whether steps are being skipped, the host may have to wait for the device
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or skipped_steps(trainer.lightning_module) > 0

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.refused = not is_finite(trainer)
        if self.refused:
            rank_zero_warn(
                f"{filepath} was not written at step {trainer.global_step}: weights, averages or moments of the "
                "optimizer are not finite."
            )
        else:
            super()._save_checkpoint(trainer, filepath)


class LastCheckpoint(SoundCheckpoint):
    """`last.ckpt`, always under that name: rewritten every `every_n_train_steps`, and when training ends.

    Lightning's own `save_last` follows the checkpoints of a monitored metric, and a run that ends between two of its
    steps would leave an older one behind. The file is replaced in one move, so a killed run never leaves half of it.

    Args:
        keep_previous: the one before it stays as `last.ckpt.previous`: a run goes on from there where `last.ckpt` is
            damaged, or where its weights turn out to have diverged. It takes as much room again.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int = 100,
        filename: str = "last",
        keep_previous: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            save_top_k=1,
            every_n_train_steps=every_n_train_steps,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            **options,
        )
        self.keep_previous = keep_previous

    @property
    def file(self) -> Path:
        """Where it lies."""
        return Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.keep_previous:
            use_run_checkpoints(trainer).kept.add(self.file)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._resumed_from: int | None = None
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path) == self.file:
            self._last_global_step_saved = trainer.global_step  # what was resumed from is not written again
            self._resumed_from = trainer.global_step

    def save_now(self, trainer: pl.Trainer) -> bool:
        """Write it unless that is forbidden or done already; whether it then is that of the present step.

        Collective: every process calls it, between two optimizer steps.
        """
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        return bool(trainer.global_step == self._last_global_step_saved)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_trial(trainer):
            return
        if trainer.global_step != self._last_global_step_saved and not skipped_steps(pl_module):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            if self.refused:
                raise NonFiniteLossError(
                    f"Training ended at step {trainer.global_step} with weights, averages or moments that are not "
                    f"finite: {self.file} is of step {self._last_global_step_saved}; lower optimizer.lr and run the "
                    "command again."
                )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, NonFiniteLossError):
            self._put_aside(trainer, pl_module)

    def _put_aside(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where no step succeeded since it was written, its weights are what has diverged: the one before it counts."""
        saved, before = self._last_global_step_saved, superseded(self.file)
        made_here = saved not in (0, self._resumed_from)  # of a run that fails at once its settings may be the cause
        diverged = made_here and isinstance(pl_module, FlowModule) and saved == pl_module.skips.read().last_good_step
        if not (diverged and trainer.is_global_zero and before.exists()):
            return
        aside = self.file.with_name(f"{self.file.name}.diverged")
        remove(aside)
        self.file.rename(aside)
        before.rename(self.file)
        rank_zero_warn(
            f"Every step after {self.file} was written (step {saved}) failed, so it was put aside as {aside.name}, and "
            "the checkpoint before it is the last one again."
        )


class BestCheckpoint(SoundCheckpoint):
    """`best.ckpt`: that of the best value of `monitor`; a value that is not finite is never the best."""

    @property
    def state_key(self) -> str:
        """As Lightning's class has it, so that checkpoints of earlier versions still say what the best value was."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        if current is None or not all_finite([current]) or not is_finite(trainer):
            return False
        return bool(super().check_monitor_top_k(trainer, current))


def is_finite(trainer: pl.Trainer) -> bool:
    """Whether all that a checkpoint would hold is finite, on every process (collective)."""
    return bool(trainer.strategy.reduce_boolean_decision(all_finite(_saved(trainer))))


def _saved(trainer: pl.Trainer) -> Iterator[Tensor]:
    module = trainer.lightning_module
    elsewhere = module.is_elsewhere if isinstance(module, FlowModule) else lambda name: False
    yield from (p for name, p in module.named_parameters() if not elsewhere(name))
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    for callback in callbacks_of(trainer):
        if isinstance(callback, EMA):
            yield from callback.shadows()
