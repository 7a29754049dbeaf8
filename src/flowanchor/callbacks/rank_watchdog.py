"""The rank watchdog in a Lightning run."""

from __future__ import annotations

import lightning.pytorch as pl

from flowanchor.base import start
from flowanchor.base.signals import Interrupted
from flowanchor.strategies.watchdog import RankWatchdog

ORPHAN = 10.0  # seconds


class WatchRanks(pl.Callback):
    """Ends every process of a run, with the cause on screen, within a minute of one that died (DDP, FSDP, any other).

    Args:
        timeout: seconds without a sign of life after which a rank counts as dead; null: do without the watchdog.
            Stop a process with SIGSTOP (or a debugger that stops its threads) for longer, and the run ends.
        interval: seconds between two signs of life.

    What dies before the first hook of a run is left to Lightning's launcher, or to torchrun, which end the others, and
    to `flowanchor.base.start`: a process ends with the one that has started it. A run that is told to stop is no death
    (`flowanchor.callbacks.interruption`).
    """

    def __init__(self, timeout: float | None = 30.0, interval: float = 2.0) -> None:
        self.watchdog = RankWatchdog(timeout, interval)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watchdog.start()
        start.patience = ORPHAN  # by now an orphan is ended with words; it may also have saved, and be about to end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted):
            self.watchdog.fail(exception)
        elif exception.together:
            self.watchdog.stop()
        else:
            self.watchdog.end_all(exception.signum, exception.sentence)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watchdog.stop()
