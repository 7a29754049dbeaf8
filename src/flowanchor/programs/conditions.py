"""What an evaluation asks a network for: a class or a prompt for every sample."""

from __future__ import annotations

import hashlib
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.metrics.protocol import make_labels
from flowanchor.sampling.prompts import encode_prompts, load_text_encoder, read_prompts

if TYPE_CHECKING:
    from flowanchor.checkpoints import LoadedModel


class Conditions:
    """Labels by the protocol, or the prompts of a file in turn; texts are encoded batch by batch.

    Attributes:
        labels: [N] (int64); None for networks without classes.
        prompts: N of them; None for networks without text.
        listed: those of the file.

    Raises:
        ConfigError: prompts for a network without text, or none for one with it.
    """

    def __init__(self, cfg: DictConfig, model: LoadedModel, device: str) -> None:
        self.model, self.negative = model, cfg.negative
        self.file, self.encoder = cfg.prompts, None
        self.prompts: list[str] | None = None
        self.listed: list[str] = []
        self.labels = make_labels(cfg.protocol, cfg.num_samples, model.backbone.num_classes, cfg.seed)
        if not hasattr(model.backbone, "text_dim"):
            if cfg.prompts is not None:
                raise ConfigError("This network is not conditioned on text: leave out prompts=.")
            return
        if cfg.prompts is None:
            raise ConfigError("This network is conditioned on text: add prompts=FILE, one prompt per line.")
        self.listed = read_prompts(cfg.prompts)
        self.prompts = [self.listed[i % len(self.listed)] for i in range(cfg.num_samples)]
        self.encoder = load_text_encoder(model, cfg.get("text_encoder")).to(device)

    def labelled(self, labels: Tensor | None) -> Conditions:
        """The same with other labels; with these, where there are none."""
        if labels is None:
            return self
        other = copy(self)
        other.labels = labels
        return other

    def of(self, start: int, stop: int) -> Tensor | None:
        """For samples start ... stop - 1: labels [b], embeddings [b, L, D], or None."""
        if self.prompts is None:
            return None if self.labels is None else self.labels[start:stop]
        assert self.encoder is not None
        return encode_prompts(self.encoder, self.model.backbone, self.prompts[start:stop], self.negative)

    def texts(self, start: int, stop: int) -> list[str] | None:
        """Prompts of samples start ... stop - 1."""
        return None if self.prompts is None else self.prompts[start:stop]

    def named(self, index: int) -> str:
        """A sample's label or prompt, for messages."""
        if self.prompts is not None:
            return f", prompt '{self.prompts[index]}'"
        return "" if self.labels is None else f", label {int(self.labels[index])}"

    def stored(self) -> np.ndarray | None:
        """For a file of samples [N]: labels, or numbers of prompts in their file."""
        if self.prompts is not None:
            return np.arange(len(self.prompts)) % len(self.listed)
        return None if self.labels is None else self.labels.numpy()

    def identity(self) -> Any:
        """Everything that the images depend on, besides the protocol and the seed."""
        if self.encoder is None:
            return None
        return [self.listed, self.negative or "", self.encoder.fingerprint()]

    def settings(self) -> dict[str, Any] | None:
        """What a report says about the prompts."""
        if self.prompts is None:
            return None
        content = hashlib.sha256("\n".join(self.listed).encode()).hexdigest()
        used = min(len(self.listed), len(self.prompts))
        return {"file": str(Path(self.file)), "n": used, "hash": content[:12], "negative": self.negative}
