"""Resuming an ordinary run (one process, DDP) from the sharded checkpoint of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from flowanchor.checkpoints.sharded import is_sharded, read_whole, replace_checkpoint, unfinished


class ShardedCheckpointIO(TorchCheckpointIO):
    """Lightning's reader of checkpoint files, and of sharded folders; what it writes are files."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The content of a checkpoint, its tensors on the CPU."""
        if is_sharded(path):
            return read_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file, also where a folder of that name lies."""
        target = Path(path)
        super().save_checkpoint(checkpoint, unfinished(target), storage_options)
        replace_checkpoint(target)
