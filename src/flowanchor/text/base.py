"""What a text encoder is, and how a batch is made of embeddings of different lengths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class TextEncoder(nn.Module, ABC):
    """A frozen network from prompts to one embedding per token.

    Attributes:
        name: as in `text_encoder=<name>`.
        width: channels of an embedding.
        max_length: tokens of the longest prompt; longer ones are cut, with a warning that shows what was cut.
    """

    name: str = ""
    width: int = 0
    max_length: int = 512

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Prompts -> for each its embeddings [L, width], float32 on the CPU, L its own number of tokens (no padding).

        An embedding depends on its prompt alone, not on the others of the call.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash (hex) of all that decides the embeddings: weights, tokenizer and settings."""


def pad_embeddings(embeddings: Sequence[Tensor], shortest: int = 0) -> Tensor:
    """Embeddings [L_i, D] -> [B, L, D], `L` the longest or `shortest`, zeros behind each: Wan reads them unmasked."""
    longest = max(shortest, *(embedding.shape[0] for embedding in embeddings))
    out = embeddings[0].new_zeros(len(embeddings), longest, embeddings[0].shape[1])
    for row, embedding in zip(out, embeddings, strict=True):
        row[: embedding.shape[0]] = embedding
    return out
