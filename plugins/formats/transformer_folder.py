"""A transformer of diffusers in its folder (`config.json`, safetensors), opened where it lies: `backbone=diffusers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowanchor.base.plain import read_json
from flowanchor.base.stock_folder import without_code
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.checkpoints.format import Choices, DescribedWeights, Format
from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.diffusers.description import description_of
from flowanchor.plugins.formats.folder_weights import CONFIG, FolderWeights, digest_of

BACKBONE = "flowanchor.plugins.backbones.diffusers.network.DiffusersTransformer"
PART = "transformer"  # of a pipeline


class TransformerFolder(Format):
    """Folders of transformers that diffusers has saved, or pipelines with one; only read."""

    name = "transformer"
    suffix = None
    in_place = True
    broad = True  # Wan's are of this kind, and have a backbone of their own

    def recognises(self, path: Path) -> bool:
        """Whether a folder says that it holds a transformer of diffusers, described or not."""
        return path.is_dir() and _folder(path) is not None

    def read(self, path: Path, choices: Choices) -> DescribedWeights:
        """As a flow model. Raises `ConfigError` for a class that nobody describes, `CheckpointError` for a folder that
        chooses code or lacks files."""
        folder = _folder(path)
        if folder is None:
            raise CheckpointError(f"{path} holds no transformer of diffusers ({CONFIG}): give its folder.")
        config = without_code(folder)
        stock = config["_class_name"]
        description_of(stock)
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        interval = {"_target_": "flowanchor.plugins.objectives.intervals.plain.PlainInterval"}
        backbone = {"_target_": BACKBONE, "stock": stock, "settings": settings}
        meta = {
            "format": FORMAT, "kind": "flow", "step": 0,
            "config": {"backbone": backbone, "objective": {"interval": interval}},
        }  # fmt: skip
        return DescribedWeights(path, FolderWeights(folder), meta)

    def digest(self, path: Path) -> str:
        folder = _folder(path)
        return digest_of([] if folder is None else [folder])


def _folder(path: Path) -> Path | None:
    """Where the transformer lies: there, or in that part of a pipeline."""
    return next((folder for folder in (path, path / PART) if _is_transformer(folder)), None)


def _is_transformer(folder: Path) -> bool:
    try:
        config: Any = read_json(folder / CONFIG)
    except (OSError, CheckpointError):
        return False
    name = config.get("_class_name") if isinstance(config, dict) else None
    return isinstance(name, str) and "Transformer" in name and "_diffusers_version" in config
