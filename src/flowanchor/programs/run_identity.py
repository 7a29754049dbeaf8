"""What a run is: who trains it, whose weights it uses, what its settings were; settled before its first step."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.callbacks.attached import is_trial, repeats_batches, trained
from flowanchor.checkpoints import latest_checkpoint
from flowanchor.checkpoints.sources import identify, resumed_sources, weight_settings
from flowanchor.errors import ConfigError, FlowAnchorError
from flowanchor.programs.batch_arithmetic import check_epoch
from flowanchor.programs.resuming import EarlierPart, changes, described, unchanged_settings
from flowanchor.provenance import write_run_record
from flowanchor.run_lock import RunLock


class RunIdentity(pl.Callback):
    """Holds the run folder's lock, compares the weights that the run uses, and records the run once it makes steps.

    The first process does all of it and tells the others. What it finds goes into every checkpoint (`flowanchor.run`,
    `sources`, `history`).

    Args:
        folder: the run folder.
        cfg: the settings.
        earlier: what is resumed; None for a run that starts.
    """

    def __init__(self, folder: Path, cfg: DictConfig, earlier: EarlierPart | None) -> None:
        self.folder, self.cfg, self.earlier = folder, cfg, earlier
        self.lock = RunLock(folder)
        self.changed: dict[str, Any] = {}  # by this resume
        self._seen = _stamp(folder)
        self._identity: dict[str, Any] | None = None  # known to the first process, until all are told

    def begin(self, trainer: pl.Trainer, module: Any) -> None:
        """Look at a run before it is fitted, and say how it goes on.

        Where the other processes have not been started yet, the first one does its part now: what it refuses is cheap.
        """
        if self.earlier is not None:
            self.changed = changes(self.earlier.config, module.config)
            module.kept_settings = unchanged_settings(self.earlier.config, module.config, "optimizer")
        if trainer.is_global_zero and (trainer.world_size == 1 or trainer.strategy.launcher is not None):
            self._identity = self._settle(module)
        if self.earlier is not None:
            new = f" with changed settings: {described(self.changed)}" if self.changed else ""
            rank_zero_info(f"Resuming {self.folder} from step {self.earlier.step}{new}.")

    def release(self) -> None:
        """Let other processes train in the folder."""
        self.lock.release()

    def _settle(self, module: Any) -> dict[str, Any]:
        self.lock.take()
        if _stamp(self.folder) != self._seen:
            raise ConfigError(f"Another process has trained in {self.folder} until now: run the same command again.")
        if self.earlier is None:
            return {"run": _new_name(), "sources": identify(weight_settings(module.config)), "history": []}
        meta = self.earlier.meta
        added = [{"step": self.earlier.step, "changed": self.changed}] if self.changed else []
        return {
            "run": meta.get("run") or _new_name(),
            "sources": resumed_sources(module.config, meta, adapters=bool(module.student.borrowed())),
            "history": [*(meta.get("history") or []), *added],
        }

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        error: FlowAnchorError | None = None
        if trainer.is_global_zero and self._identity is None:
            try:
                self._identity = self._settle(pl_module)
            except FlowAnchorError as found:
                error = found
        error, identity = trainer.strategy.broadcast((error, self._identity))
        if error is not None:
            raise error
        assert identity is not None
        trained(pl_module).identity = identity

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (is_trial(trainer) or repeats_batches(trainer)):
            wanted = self.cfg.get("global_batch_size")
            check_epoch(trainer.num_training_batches, trainer.accumulate_grad_batches, wanted)
        if trainer.is_global_zero:
            identity = trained(pl_module).identity
            told = {"run": identity["run"], "sources": identity["sources"]}
            step = 0 if self.earlier is None else self.earlier.step
            write_run_record(self.folder, self.cfg, step, **told, **({"changed": self.changed} if self.changed else {}))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.lock.check()


def _new_name() -> str:
    return uuid.uuid4().hex[:12]


def _stamp(folder: Path) -> tuple[Path, int] | None:
    """Which checkpoint a run would go on from."""
    path = latest_checkpoint(folder)
    return None if path is None else (path, path.stat().st_mtime_ns)
