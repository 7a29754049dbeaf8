"""How Lightning reads and writes the checkpoints of a run that is not sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import TorchCheckpointIO

from flowanchor.base.files import remove, replacing, save_torch
from flowanchor.checkpoints.sharded import is_sharded, read_whole
from flowanchor.checkpoints.soundness import sound_checkpoint


class RunCheckpointIO(TorchCheckpointIO):
    """Files that replace their predecessors in one move; reads files, and the folders of sharded runs.

    Lightning's own saver stages a file in the temporary folder and copies it over the old one where that lies on
    another file system: a run that is killed meanwhile is left with half a checkpoint, and without the one before.
    """

    def __init__(self) -> None:
        self.kept: set[Path] = set()  # of these the predecessor stays, as `superseded(path)`

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file, also where a folder of that name lies."""
        target = Path(path)
        with replacing(target, keep_previous=target in self.kept) as draft:
            save_torch(draft, checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The content of a sound checkpoint, its tensors on the CPU; `sound_checkpoint` says what happens to others."""
        target = sound_checkpoint(Path(path))
        if is_sharded(target):
            return read_whole(target)
        return super().load_checkpoint(target, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint, if there is one."""
        remove(Path(path))


def use_run_checkpoints(trainer: pl.Trainer) -> RunCheckpointIO:
    """The trainer's reader and writer of checkpoints, which becomes one of ours where it is Lightning's plain one."""
    strategy = trainer.strategy
    if not isinstance(strategy.checkpoint_io, RunCheckpointIO):
        strategy.checkpoint_io = RunCheckpointIO()
    return strategy.checkpoint_io
