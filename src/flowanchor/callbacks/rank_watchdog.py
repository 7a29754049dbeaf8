"""The rank watchdog in a Lightning run."""

from __future__ import annotations

import lightning.pytorch as pl

from flowanchor.strategies.watchdog import RankWatchdog


class WatchRanks(pl.Callback):
    """Ends every process of a run, with the cause on screen, within a minute of one that died (DDP, FSDP, any other).

    Args:
        timeout: seconds without a sign of life after which a rank counts as dead; null: do without the watchdog.
            Stop a process with SIGSTOP (or a debugger that stops its threads) for longer, and the run ends.
        interval: seconds between two signs of life.

    What dies before the first hook of a run is left to Lightning's launcher, or to torchrun: they end the others.
    """

    def __init__(self, timeout: float | None = 30.0, interval: float = 2.0) -> None:
        self.watchdog = RankWatchdog(timeout, interval)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watchdog.start()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.watchdog.fail(exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watchdog.stop()
