"""Prompts as users give them, and the encoder that a network of text was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowanchor.base.tables import is_table, read_captions, read_lines
from flowanchor.base.trusted import build
from flowanchor.checkpoints.load import LoadedModel
from flowanchor.errors import ConfigError
from flowanchor.text.base import TextEncoder


def load_text_encoder(model: LoadedModel, chosen: Any = None) -> TextEncoder:
    """The encoder of a network's prompts: the one of its training, or `chosen` (a config group) in its place.

    Raises `ConfigError` where neither is known.
    """
    if chosen is not None and "_target_" in chosen:
        from flowanchor.base.typed import instantiate  # a model is opened and sampled without Hydra

        encoder: TextEncoder = instantiate(chosen, _convert_="all")
        return encoder.eval()
    settings = model.config.get("text_encoder")
    if not settings or "_target_" not in settings:
        raise ConfigError(
            f"{model.path} does not say how its prompts are encoded: add text_encoder=umt5 text_encoder.weights=FOLDER."
        )
    found: TextEncoder = build(settings, "text_encoder", model.path)
    return found.eval()


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file, one per line, or of a CSV, TSV or JSONL table: the first caption of every row.

    Raises `ConfigError` without a file or without prompts, `DataError` for a table without the column `caption` and for
    a line that cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"There is no file {path}: prompts= names a file with one prompt per line, or a table.")
    found = read_captions(path) if is_table(path) else list(read_lines(path))
    if not found:
        raise ConfigError(f"{path} holds no prompts: write one per line.")
    return found
