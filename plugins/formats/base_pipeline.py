"""A pipeline of Wan on this machine: what an export takes from it, and how that gets into a new folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowanchor.base.plain import read_json
from flowanchor.base.stock_folder import without_code
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import CheckpointError

INDEX = "model_index.json"
SCHEDULER = ["flowanchor_scheduler", "FlowAnchorScheduler"]  # file and class of ours, as the index names them
VAE = "AutoencoderKLWan"
MARK = {"_exported_by": "flowanchor"}  # in an index without a part of ours; diffusers skips it


def is_exported(path: Path) -> bool:
    """Whether a folder is a pipeline that was exported here."""
    try:
        index = read_json(path / INDEX)
        return bool(index.get("scheduler") == SCHEDULER or MARK.items() <= index.items())
    except (OSError, CheckpointError, AttributeError, TypeError):
        return False


@dataclass(frozen=True)
class BasePipeline:
    """The parts of a diffusers pipeline that its network shares with others: VAE, text encoder, tokenizer."""

    folder: Path
    parts: dict[str, list[str]]  # name -> library and class, as in the index

    @classmethod
    def read(cls, path: str | Path) -> BasePipeline:
        """A folder as diffusers saves it; raises `CheckpointError` where a part is missing or is not Wan's."""
        folder = Path(path).expanduser()
        index = _json(folder / INDEX, f"{folder} is no folder of a diffusers pipeline")
        parts: dict[str, Any] = {name: index.get(name) for name in ("vae", "text_encoder", "tokenizer")}
        missing = [name for name, entry in parts.items() if not (_of_library(entry) and (folder / name).is_dir())]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {', '.join(missing)}: download all folders of the pipeline, whose classes must be of "
                "diffusers or transformers."
            )
        if parts["vae"][1] != VAE:
            raise CheckpointError(f"{folder} decodes by {parts['vae'][1]}: give a pipeline of Wan, which has {VAE}.")
        return cls(folder, parts)

    def config(self, part: str) -> dict[str, Any]:
        """The `config.json` of a part."""
        return _json(self.folder / part / "config.json", f"{self.folder / part} is incomplete")

    def place(self, target: Path, link: bool, statistics: LatentStatistics | None) -> None:
        """Put the parts into a new folder, as copies or as links to the files.

        `statistics` of the network's samples, where it was not trained with the VAE's own, are written into the copy of
        the VAE's configuration.
        """
        for part in self.parts:
            without_code(self.folder / part)
        for part in self.parts:
            # Code beside the weights would be run by whoever trusts the scheduler's file.
            code = shutil.ignore_patterns("*.py", "*.pyc", "*.pkl", "__pycache__")
            copy = _link if link else shutil.copyfile
            shutil.copytree(self.folder / part, target / part, copy_function=copy, ignore=code)
        if statistics is not None:
            config, channels = self.config("vae"), self.config("vae")["z_dim"]
            mean, std = statistics.mean or (0.0,) * channels, statistics.std or (1.0,) * channels
            config["latents_mean"] = list(mean)
            config["latents_std"] = [value / statistics.multiplier for value in std]
            file = target / "vae" / "config.json"
            file.unlink()  # it may be a link
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _of_library(entry: Any) -> bool:
    """Whether an entry of the index names a library's class; another first word is a file of code in the folder."""
    listed = isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
    return listed and entry[0] in ("diffusers", "transformers") and entry[1].isidentifier()


def _link(source: str, target: str) -> None:
    os.symlink(Path(source).resolve(), target)


def _json(file: Path, problem: str) -> dict[str, Any]:
    try:
        found = read_json(file)
    except (OSError, CheckpointError) as error:
        reason = "is not there" if not file.is_file() else f"cannot be read ({error})"
        raise CheckpointError(
            f"{problem} ({file.name} {reason}): add pipeline=FOLDER, a downloaded pipeline of Wan."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{problem} ({file.name} has no settings): download the pipeline again.")
    return found
