"""What is asked of a network in one go: how many samples, and of each what it shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.text.base import TextEncoder

if TYPE_CHECKING:
    from flowanchor.conditioning import Text

PROTOCOLS = ("balanced", "random")


class Request(ABC):
    """`n` samples, each with its condition. Made by `Conditioning.request`, which refuses what does not fit."""

    n: int

    @abstractmethod
    def cond(self, start: int, stop: int, encoder: TextEncoder | None = None) -> Any:
        """The condition of samples start ... stop - 1, as the network takes it, on the CPU.

        `encoder` reads texts that were not encoded before; the network is then told what stands for no text, too.
        """

    @abstractmethod
    def part(self, start: int, stop: int) -> Request:
        """Samples start ... stop - 1 alone."""

    @abstractmethod
    def numbers(self) -> np.ndarray | None:
        """For a file of samples, [n] (int64): labels, or which of `names` each sample has; None: neither."""

    def encoded(self, encoder: TextEncoder | None) -> Request:
        """The same with its texts encoded at once, so that the encoder may go."""
        return self

    def texts(self, start: int, stop: int) -> list[str] | None:
        """Prompts of samples start ... stop - 1; None for a network without text."""
        return None

    def names(self) -> list[str]:
        """The prompts that take turns; empty for a network without text."""
        return []

    def named(self, index: int) -> str:
        """A sample's label or prompt, for the middle of a message."""
        return ""

    def identity(self) -> list[Any] | None:
        """What the samples depend on beside labels: prompts and the negative one; None for a network without text."""
        return None


class Labels(Request):
    """A class for every sample, [n] (int64), or nothing."""

    def __init__(self, n: int, labels: Tensor | None = None) -> None:
        self.n, self.labels = n, labels

    def cond(self, start: int, stop: int, encoder: TextEncoder | None = None) -> Tensor | None:
        return None if self.labels is None else self.labels[start:stop]

    def part(self, start: int, stop: int) -> Labels:
        return Labels(stop - start, self.cond(start, stop))

    def numbers(self) -> np.ndarray | None:
        return None if self.labels is None else self.labels.numpy()

    def named(self, index: int) -> str:
        return "" if self.labels is None else f", label {int(self.labels[index])}"


class Texts(Request):
    """A prompt for every sample: those of a list in turn.

    Args:
        conditioning: of the network.
        n: how many samples.
        prompts: that take turns.
        negative: the negative prompt, for guidance; None: the empty one.
        known: embeddings of all prompts, where an encoder is not needed any more.
        null: the embedding of the negative one, with them; None: the network keeps what it has.
    """

    def __init__(
        self,
        conditioning: Text,
        n: int,
        prompts: Sequence[str],
        negative: str | None = None,
        known: Mapping[str, Any] | None = None,
        null: Any = None,
    ) -> None:
        self.conditioning, self.n, self.prompts, self.negative = conditioning, n, list(prompts), negative
        self.known, self.null, self.start = known, null, 0

    def cond(self, start: int, stop: int, encoder: TextEncoder | None = None) -> Any:
        texts = self.texts(start, stop)
        known, null = (self._read(texts, encoder)) if self.known is None else (self.known, self.null)
        if null is not None:
            self.conditioning.use_null(null)
        return self.conditioning.batch([known[text] for text in texts])

    def encoded(self, encoder: TextEncoder | None) -> Texts:
        other = copy(self)
        other.known, other.null = self._read(self.texts(0, self.n), encoder)
        return other

    def _read(self, texts: Sequence[str], encoder: TextEncoder | None) -> tuple[dict[str, Any], Any]:
        if encoder is None:
            raise ConfigError("Prompts need a text encoder: add text_encoder=NAME text_encoder.weights=FOLDER.")
        asked = list(dict.fromkeys(texts))
        known = dict(zip(asked, self.conditioning.fitted(encoder, asked), strict=True))
        return known, self.conditioning.fitted_negative(encoder, self.negative or "")

    def part(self, start: int, stop: int) -> Texts:
        other = copy(self)
        other.start, other.n = self.start + start, stop - start
        return other

    def texts(self, start: int, stop: int) -> list[str]:
        return [self.prompts[(self.start + i) % len(self.prompts)] for i in range(start, stop)]

    def numbers(self) -> np.ndarray:
        return (self.start + np.arange(self.n)) % len(self.prompts)

    def names(self) -> list[str]:
        return list(self.prompts)

    def named(self, index: int) -> str:
        return f", prompt '{self.texts(index, index + 1)[0]}'"

    def identity(self) -> list[Any]:
        return [self.prompts, self.negative or ""]


def make_labels(protocol: str, num_samples: int, num_classes: int, seed: int) -> Tensor | None:
    """Labels [N] (int64), None for networks without classes.

    `balanced`: sample i has class `i % num_classes`, so that every prefix is as balanced as it can be. `random`: drawn
    independently with the seed. Published FID uses balanced labels; random ones score up to a tenth worse.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"There is no label protocol '{protocol}': use protocol={' or protocol='.join(PROTOCOLS)}.")
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples} is too few: for example num_samples=1000.")
    if num_classes == 0:
        return None
    if protocol == "balanced":
        return torch.arange(num_samples) % num_classes
    return torch.randint(num_classes, (num_samples,), generator=torch.Generator().manual_seed(seed))
