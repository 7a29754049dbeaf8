"""Weights & Biases: one run per training, and the same one when it is resumed."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from flowanchor.base.files import write_whole


class RunWandbLogger(WandbLogger):
    """Lightning's logger under an id that is kept in the run's folder; a job of a sweep ends its run.

    Args:
        save_dir: the run's folder.
        settings: of Lightning's logger.
    """

    def __init__(self, save_dir: str, **settings: Any) -> None:
        super().__init__(save_dir=save_dir, id=run_id(Path(save_dir)), resume="allow", **settings)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Also leaves wandb's process, which would take the next job's numbers for this run's."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(0 if status == "success" else 1)
            self._experiment = None


@rank_zero_only
def run_id(folder: Path) -> str:
    """The id of the run in a folder, made at first."""
    note = folder / "wandb" / "id.txt"
    if not note.is_file():
        write_whole(note, uuid.uuid4().hex[:8])
    return note.read_text(encoding="utf-8").strip()
