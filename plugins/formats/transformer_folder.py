"""A transformer of diffusers in its folder (`config.json`, safetensors): opened where it lies, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.files import flush, remove, replace, unfinished
from flowanchor.base.plain import read_json
from flowanchor.base.stock_folder import without_code
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.checkpoints.format import Choices, DescribedWeights, Format
from flowanchor.checkpoints.load import open_described
from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.diffusers.description import description_of
from flowanchor.plugins.formats.folder_weights import CONFIG, FolderWeights, digest_of

BACKBONE = "flowanchor.plugins.backbones.diffusers.network.DiffusersTransformer"
PART = "transformer"  # of a pipeline


class TransformerFolder(Format):
    """Folders of transformers that diffusers has saved, or pipelines with one; of a `backbone=diffusers` such a folder
    is written, which stock diffusers opens.

    Args:
        dtype: name of the type in which weights are written, but for those that diffusers keeps in float32; None: as
            they are.
    """

    name = "transformer"
    suffix = ""
    in_place = True
    casts = False
    broad = True  # Wan's are of this kind, and have a backbone of their own

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype

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

    def replaces(self, output: Path) -> bool:
        return _is_transformer(output)

    def write(self, given: DescribedWeights, output: Path) -> str:
        """As diffusers saves it, adapters added to the weights. Raises `CheckpointError` for another network."""
        from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer  # diffusers takes seconds

        backbone, _ = open_described(given)
        if not isinstance(backbone, DiffusersTransformer):
            raise CheckpointError(
                f"{given.file} holds a {type(backbone).__name__}, and format=transformer writes a backbone=diffusers: "
                "use format=huggingface."
            )
        if backbone.takes_end_time:
            raise CheckpointError(
                f"{given.file} is told where a jump ends (backbone.end_time={backbone.end_time}), and no stock network "
                "of diffusers is: use format=huggingface."
            )
        backbone.merge()
        network = backbone.network
        kept = set(network._keep_in_fp32_modules or ())
        for name, parameter in network.named_parameters():
            if self.dtype is not None and not kept.intersection(name.split(".")):
                parameter.data = parameter.data.to(DTYPES[self.dtype])
        partial = unfinished(output)
        remove(partial)
        partial.mkdir(parents=True)
        network.save_pretrained(partial)
        flush(partial)
        replace(partial, output)
        return f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters"


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
