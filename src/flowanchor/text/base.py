"""What a text encoder is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Tokens(NamedTuple):
    """The text of an encoder that gives one embedding per token; of a batch, zeros fill up the shorter ones."""

    tokens: Tensor  # [L, D] of one text, [B, L, D] of a batch


class TextEncoder(nn.Module, ABC):
    """A frozen network (or several) from prompts to what a network of text is conditioned on.

    Attributes:
        name: as in `text_encoder=<name>`.
        width: channels of an embedding.
        max_length: tokens of the longest prompt; longer ones are cut, with a warning that shows what was cut.
    """

    name: str = ""
    width: int = 0
    max_length: int = 512

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Any]:
        """Prompts -> for each a named tuple of tensors, float32 on the CPU, whose fields the encoder chooses: `Tokens`
        [L, width], L its own number of tokens (no padding), or several such sequences, masks [L], vectors [D].

        It depends on its prompt alone, not on the others of the call.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash (hex) of all that decides the embeddings: weights, tokenizer and settings."""
