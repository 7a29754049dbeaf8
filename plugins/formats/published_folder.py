"""A folder to publish, in the style of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowanchor.base.trusted import build
from flowanchor.base.typed import instantiate
from flowanchor.checkpoints.digest import file_digest
from flowanchor.checkpoints.format import DescribedWeights, Format
from flowanchor.checkpoints.huggingface import is_published, write_folder
from flowanchor.checkpoints.model_card import model_card, read_metrics
from flowanchor.checkpoints.summary import count
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Codec


class PublishedFolder(Format):
    """`config.json`, `model.safetensors`, a model card. It is a checkpoint, so no format is needed to read it.

    Args:
        metrics: `metrics.json` that eval.py wrote about this checkpoint, for the model card.
        with_codec: whether the codec's weights go along.
        codec: the entry of a configuration for that codec; None: the codec of the checkpoint.
        title: of the model card; None: the folder's name.
    """

    name = "huggingface"
    suffix = ""
    predictions = ("v", "x")

    def __init__(
        self,
        metrics: str | Path | None = None,
        with_codec: bool = False,
        codec: Mapping[str, Any] | None = None,
        title: str | None = None,
    ) -> None:
        self.metrics, self.with_codec, self.codec, self.title = metrics, with_codec, codec, title

    def recognises(self, path: Path) -> bool:
        return False

    def replaces(self, output: Path) -> bool:
        return is_published(output)

    def write(self, given: DescribedWeights, output: Path) -> str:
        report = None if self.metrics is None else read_metrics(self.metrics, file_digest(given.file), given.ema)
        codec = self._codec(given) if self.with_codec else None
        name = self.title or output.name
        card = model_card(name, given.meta, given.ema, report, given.weights, with_codec=codec is not None)
        write_folder(output, given.weights, given.meta, given.ema, card, codec)
        return count(given.weights)

    def _codec(self, given: DescribedWeights) -> Codec:
        """The codec whose weights are published: that of the checkpoint, or the one of the command line."""
        settings = given.meta["config"].get("codec")
        if self.codec is not None:
            codec: Codec = instantiate(self.codec, _convert_="all")
        elif settings:
            codec = build(settings, "codec", given.file)
        else:
            raise ConfigError(f"with_codec=true: {given.file} does not say what its codec is: add codec=NAME.")
        if not codec.usable:
            raise ConfigError(
                f"with_codec=true: where are the codec's weights? Add codec={codec.name} codec.weights=FILE."
            )
        return codec
