"""A training that is told to stop: it finishes its step, writes `last.ckpt`, and ends on all processes together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.base.signals import current, stopped_by
from flowanchor.callbacks.attached import callback_of, callbacks_of
from flowanchor.callbacks.checkpointing import LastCheckpoint
from flowanchor.callbacks.rank_watchdog import WatchRanks
from flowanchor.strategies.stopping import Undecided

MOMENTS = 10**9  # at which a run may stop, per step: at its end, and after each batch of the validation that follows


class Interruption(pl.Callback):
    """Stops a run where its program has received a signal (`flowanchor.base.signals`).

    The checkpoint is written by the run's `LastCheckpoint`, at the end of an optimizer step; in the middle of a
    validation it is that of the step before it. The run is left by `Interrupted` a moment later, when the step has
    been logged, and resumes there: a validation that was due, or was cut off, is made first (`on_train_start`).

    The ranks of a run agree on the step through the rank watchdog. Without it, they ask each other after every step.
    """

    def __init__(self) -> None:
        self._first = -1  # the step at which this part of the run began
        self._step = -1  # the optimizer step whose end was seen last
        self._ready: tuple[int, str] | None = None  # signal and sentence, once the run can be left

    # -------------------------------------------------------------------------------------------------- where it ends

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        watchdog = _watchdog(trainer)
        if watchdog is not None:
            current().end_others = watchdog.end_all

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        listener = current()
        listener.deferred = True
        self._first = self._step = trainer.global_step
        _validate_what_is_due(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        signum = self._agreed(trainer, self._step * MOMENTS)
        if signum is not None:
            self._save(trainer, signum)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if trainer.sanity_checking or not current().deferred or _asks_every_step(trainer):
            return
        signum = self._agreed(trainer, self._step * MOMENTS + batch_idx + 1)
        if signum is None:
            return
        if self._step > self._first:
            # As it was at the end of the step: Lightning counts a batch as completed after its callbacks.
            progress = trainer.fit_loop.epoch_loop.batch_progress
            for part in (progress.total, progress.current):
                part.completed -= 1
        self._save(trainer, signum)
        self._leave(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        listener = current()
        run = trainer.default_root_dir
        listener.state = f"at step {trainer.global_step}, the last one: the run in {run} is finished"
        if listener.first is not None:
            listener.obey(listener.first)
        listener.no_longer_defer()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        current().no_longer_defer()

    # ---------------------------------------------------------------------------------------------------- how it ends

    def _agreed(self, trainer: pl.Trainer, moment: int) -> int | None:
        """The signal by which all ranks stop here; None: they go on."""
        own = current().first
        watchdog = _watchdog(trainer)
        if watchdog is not None:
            try:
                return watchdog.passing(moment, own)
            except Undecided as error:
                current().obey(own or 15, str(error))
        if trainer.world_size == 1:
            return own
        flag = torch.tensor(float(own or 0), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(flag, reduce_op="max")) or None

    def _save(self, trainer: pl.Trainer, signum: int) -> None:
        step, run = trainer.global_step, trainer.default_root_dir
        last = callback_of(trainer, LastCheckpoint)
        if step == self._first:
            end = f"no step has been made since {run} was resumed, so there is nothing to save"
        elif last is None:
            end = f"nothing is saved in {run}, as the run has no callbacks.last"
        elif last.save_now(trainer):
            end = f"saved in {run}, and the same command goes on from there"
        else:
            end = f"this step is not worth saving, and the same command goes on from the checkpoint in {run} before it"
        self._ready = signum, stopped_by(signum, f"at step {step}: {end}")

    def _leave(self, trainer: pl.Trainer) -> None:
        if self._ready is None:
            return
        # Lightning's observer of the processes that it has started would kill this one when they end.
        children = getattr(trainer.strategy.launcher, "procs", [])
        current().children.extend(children)
        children.clear()
        current().obey(*self._ready, together=True)


def take_over(trainer: pl.Trainer) -> pl.Trainer:
    """Let no signal, and no checkpoint, be the trainer's own affair.

    Lightning would answer SIGTERM by an exit without a code (after a collective in the handler, which hangs where a
    rank is busy with another one), and SLURM's notice by a checkpoint of another name, which it then resumes from
    unasked.
    """
    trainer._signal_connector = _NoHandlers(trainer)
    trainer._checkpoint_connector = _NoOtherCheckpoint(trainer)
    # Asked before every batch by all ranks, with a synchronisation of the device.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    callbacks = callbacks_of(trainer)
    callbacks.append(Interruption())
    callbacks.sort(key=lambda callback: isinstance(callback, pl.callbacks.Checkpoint))
    for other in sorted(Path(trainer.default_root_dir).glob("hpc_ckpt_*")):
        rank_zero_warn(
            f"{other} was written by an earlier version at a signal of SLURM and is not read: delete it, or put it in "
            "the place of checkpoints/last.ckpt to go on from it."
        )
    return trainer


class _NoHandlers(_SignalConnector):
    def register_signal_handlers(self) -> None:
        pass


class _NoOtherCheckpoint(_CheckpointConnector):
    _hpc_resume_path = None


def _watchdog(trainer: pl.Trainer) -> Any:
    found = callback_of(trainer, WatchRanks)
    return None if found is None or found.watchdog.timeout is None else found.watchdog


def _asks_every_step(trainer: pl.Trainer) -> bool:
    return trainer.world_size > 1 and _watchdog(trainer) is None


def _validate_what_is_due(trainer: pl.Trainer) -> None:
    """Make the validation that belongs to the step of a checkpoint and had not been made when it was written.

    A checkpoint of the end of a step lies before the validation of that step; Lightning goes on with the step after it.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if not loop.restarted_on_train_batch_end or fetcher is None or not loop._should_check_val_fx(fetcher):
        return
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
