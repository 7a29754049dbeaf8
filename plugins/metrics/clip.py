"""CLIP from a local folder: what images and texts have in common, through transformers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.base.stock_folder import without_code
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.metrics.stock_network import read_stock

BYTES = 256  # a vocabulary of CLIP has at least all single bytes


class Clip(nn.Module):
    """A frozen CLIP with its processor, as torchmetrics' `CLIPScore` wants them.

    A prompt with too many tokens is cut before its last one, which marks the end and is where CLIP reads a text.

    Args:
        folder: `config.json`, safetensors, tokenizer and `preprocessor_config.json`, as `save_pretrained` writes them.

    Raises:
        ConfigError: no folder, or transformers is missing.
        CheckpointError: a folder that holds no CLIP.
    """

    def __init__(self, folder: str | Path | None) -> None:
        super().__init__()
        if not folder:
            raise ConfigError("metric=t2i needs the weights of CLIP: add metric.clip=FOLDER (docs/evaluation.md).")
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise CheckpointError(f"There is no folder {self.folder} with CLIP: set metric.clip=FOLDER.")
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise ConfigError("metric=t2i needs transformers: pip install 'flowanchor[wan]'.") from error
        without_code(self.folder)
        network, self.processor = read_stock(CLIPModel, self.folder, "CLIP", CLIPProcessor)
        if len(self.processor.tokenizer) < BYTES:  # transformers makes an empty one where files are missing
            raise CheckpointError(f"The tokenizer in {self.folder} has no vocabulary: download vocab.json, merges.txt.")
        self.network: Any = network
        self.tokens = int(self.network.config.text_config.max_position_embeddings)
        self.width = int(self.network.config.projection_dim)

    @property
    def config(self) -> Any:
        """The network's, for torchmetrics."""
        return self.network.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Prepared images [B, 3, H, W] -> projected embeddings [B, D]."""
        return _tensor(self.network.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens [B, L] -> projected embeddings [B, D]."""
        return _tensor(self.network.get_text_features(input_ids=input_ids, attention_mask=attention_mask))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> image embeddings [B, D] of length 1."""
        prepared = self.prepare(images=list(images.cpu()))["pixel_values"].to(images.device)
        return functional.normalize(self.get_image_features(prepared).float(), dim=-1)

    def prepare(
        self, text: Sequence[str] | None = None, images: Sequence[Tensor] | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Tokens of texts, or pixels of uint8 images [3, H, W]."""
        if images is not None:
            # Told, not guessed from the shape: an image three pixels wide is no image with its channels last.
            found: dict[str, Tensor] = self.processor(
                images=list(images), return_tensors="pt", input_data_format="channels_first"
            )
            return found
        assert text is not None
        tokens: dict[str, Tensor] = self.processor(
            text=list(text), return_tensors="pt", padding=True, truncation=True, max_length=self.tokens
        )
        full = tokens["attention_mask"].sum(1) == self.tokens
        for number in full.nonzero().flatten().tolist():
            count = len(self.processor.tokenizer(text[number])["input_ids"])
            if count > self.tokens:
                warnings.warn(
                    f"A prompt has {count} tokens and CLIP reads {self.tokens}; the rest does not count: "
                    f"'{text[number][:60]}...'.",
                    stacklevel=2,
                )
        return tokens

    def pair(self) -> tuple[Any, Any]:
        """Model and processor, for torchmetrics."""
        return self, self.prepare


def _tensor(found: Any) -> Tensor:
    """The embeddings, which transformers 5 wraps."""
    embeddings: Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return embeddings
