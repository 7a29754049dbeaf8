"""What a text encoder is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Tokens(NamedTuple):
    """The text of an encoder that gives one embedding per token; of a batch, zeros fill up the shorter ones."""

    tokens: Tensor  # [L, D] of one text, [B, L, D] of a batch


class MaskedTokens(NamedTuple):
    """An embedding per token, and which of them are text."""

    tokens: Tensor  # [B, L, D], or [B, L, layers, D]
    mask: Tensor  # [B, L] (bool)


class PooledTokens(NamedTuple):
    """An embedding per token, and one of the whole text."""

    tokens: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]


class TwoTexts(NamedTuple):
    """The text by two encoders."""

    tokens: Tensor  # [B, L, D]
    mask: Tensor  # [B, L] (bool)
    tokens_2: Tensor  # [B, M, E]
    mask_2: Tensor  # [B, M] (bool)


KINDS: dict[tuple[str, ...], type[Any]] = {
    kind._fields: kind for kind in (Tokens, MaskedTokens, PooledTokens, TwoTexts)
}  # that files of captions hold


def is_sequence(field: str) -> bool:
    """Whether a field of these kinds has an entry per token (tokens, masks), and not one per text."""
    return field.startswith(("tokens", "mask"))


def kind_of(fields: Collection[str]) -> type[Any]:
    """The kind of text with these fields, in whatever order; raises `KeyError` where there is none."""
    return {frozenset(names): kind for names, kind in KINDS.items()}[frozenset(fields)]


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

    def encode_negative(self, prompt: str) -> Any:
        """The negative prompt, which some pipelines encode in another way than what is to be drawn."""
        return self.encode([prompt])[0]

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash (hex) of all that decides the embeddings: weights, tokenizer and settings."""
