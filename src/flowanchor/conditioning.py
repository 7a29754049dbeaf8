"""What a network is conditioned on beside the time: nothing, classes, or texts.

A condition is what a batch brings to the network (`Batch.cond`): None, labels [B], or a named tuple of tensors
[B, ...] that the text encoder names. What else depends on its kind stands here: what replaces a condition for guidance
and in training, how two batches become one, and what a user may ask for.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.errors import ConfigError
from flowanchor.request import Labels, Request, Texts, make_labels
from flowanchor.text.base import TextEncoder

SHOWN = 80  # characters of a prompt in a warning


class Conditioning(ABC):
    """The kind of a network's condition.

    Attributes:
        classes: how many there are; 0: it is not conditioned on classes.
        dropout: share of the conditions that training replaces by the null condition.
        example: the arguments of `OpenedModel.sample` that a model card shows, beside how many.
    """

    classes: int = 0
    dropout: float = 0.0
    example: str = ""

    @abstractmethod
    def described(self) -> str:
        """In a word or two, for messages and model cards."""

    @abstractmethod
    def null(self, cond: Any) -> Any:
        """What stands for no condition, for as many samples; raises `ConfigError` where the network knows none."""

    def is_null(self, cond: Any) -> Tensor:
        """Which samples of a batch have the null condition, [B] (bool)."""
        return cast(Tensor, cond == self.null(cond))

    @abstractmethod
    def stack(self, first: Any, second: Any) -> Any:
        """Two batches of conditions as one of `B + B'` samples."""

    @abstractmethod
    def dropped(self, cond: Any, among: Tensor | None = None) -> Any:
        """The same with a random share `dropout` of the conditions replaced by the null condition.

        `among`: the samples, [B] (bool), that may lose theirs; the share is still one of the batch, where they are
        enough for it.
        """

    def _chosen(self, size: int, device: torch.device, among: Tensor | None) -> Tensor:
        """Which conditions are dropped, [B] (bool)."""
        draw = torch.rand(size, device=device)
        if among is None:
            return draw < self.dropout
        return (draw * among.sum().clamp(min=1) < self.dropout * size) & among

    def request(
        self,
        n: int,
        classes: Any = None,
        prompts: Sequence[str] | None = None,
        negative: str | None = None,
        protocol: str = "balanced",
        seed: int = 0,
    ) -> Request:
        """`n` samples to draw; raises `ConfigError` for what this network cannot be asked.

        Args:
            classes: those that take turns, or one; None: by the protocol.
            prompts: those that take turns.
            negative: the negative prompt, where the sampler guides; None: the empty one.
            protocol, seed: which class each sample has, `balanced` or `random` (`make_labels`).
        """
        for name, given in (("prompt= and prompts=", prompts), ("negative=", negative)):
            if given is not None:
                raise ConfigError(f"This network is not conditioned on text: leave out {name}.")
        labels = make_labels(protocol, n, self.classes, seed)
        if classes is None:
            return Labels(n, labels)
        if not self.classes:
            raise ConfigError("This network was trained without classes: leave out classes= (labels).")
        try:
            chosen = torch.as_tensor(classes)
        except (TypeError, ValueError, RuntimeError):  # texts, lists of unequal length
            chosen = torch.empty(0, 0)
        chosen = chosen[None] if chosen.ndim == 0 else chosen
        whole = chosen.ndim == 1 and len(chosen) > 0 and not chosen.is_floating_point()
        if not whole or not bool(((chosen >= 0) & (chosen < self.classes)).all()):
            raise ConfigError(
                f"classes={classes}: labels must be whole numbers between 0 and {self.classes - 1}, for example "
                "classes=[0,1]."
            )
        return Labels(n, chosen.long()[torch.arange(n) % len(chosen)])

    def use_null(self, text: Any) -> None:  # noqa: B027 - labels have a class of their own for it
        """From now on this is what stands for no text: the condition of one sample, of the negative prompt."""


class NoCondition(Conditioning):
    """Nothing: an unconditional network."""

    def described(self) -> str:
        return "0 classes"

    def null(self, cond: Any) -> Any:
        raise ConfigError(
            "This network is conditioned on nothing, and has no null class for guidance: set teacher.guidance_scale=1 "
            "(or sampler.guidance_scale=1)."
        )

    def stack(self, first: None, second: None) -> None:
        return None

    def dropped(self, cond: Any, among: Tensor | None = None) -> Any:
        return cond


class Classes(Conditioning):
    """One of `classes` classes, as labels [B] (int64).

    Args:
        classes: how many.
        null: whether label `classes` is the null class.
        dropout: share of the labels that training replaces by it.
    """

    def __init__(self, classes: int, null: bool = True, dropout: float = 0.0) -> None:
        self.classes, self.has_null, self.dropout = classes, null, dropout

    def described(self) -> str:
        return f"{self.classes} classes"

    def null(self, cond: Tensor | None) -> Tensor:
        if not self.has_null or cond is None:
            raise ConfigError(
                "This network has no null class for guidance: set backbone.class_dropout_prob=0.1, or the guidance "
                "scale to 1."
            )
        return torch.full_like(cond, self.classes)

    def stack(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second])

    def dropped(self, cond: Tensor | None, among: Tensor | None = None) -> Tensor | None:
        if cond is None or self.dropout <= 0:
            return cond
        return torch.where(self._chosen(cond.shape[0], cond.device, among), self.null(cond), cond)


class Text(nn.Module, Conditioning):
    """Texts, as a named tuple of tensors [B, ...] which the text encoder names (embeddings, a mask, a pooled vector).

    What stands for no text moves with the network and belongs to no checkpoint: the data or the prompts bring it.

    Args:
        null: the condition of one sample without text, as long as nothing else is told (`use_null`). Its type, and its
            shapes but for the lengths, are those that the network reads.
        longest: tokens that the network reads of each field that is a sequence [L, ...]. Sequences of unequal length
            are filled up with zeros (False in a mask), others are alike in all texts.
        dropout: share of the texts that training replaces by the null one.
    """

    example = 'prompts="a red fox in the snow", '

    def __init__(self, null: Any, longest: Mapping[str, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.kind, self.longest, self.dropout = type(null), dict(longest), dropout
        for name, value in zip(null._fields, null, strict=True):
            self.register_buffer(f"null_{name}", value, persistent=False)

    @property
    def null_text(self) -> Any:
        """What stands for no text: the condition of one sample."""
        return self.kind(*(getattr(self, f"null_{name}") for name in self.kind._fields))

    def use_null(self, text: Any) -> None:
        for name, value, before in zip(self.kind._fields, text, self.null_text, strict=True):
            setattr(self, f"null_{name}", value.to(before.device))

    def described(self) -> str:
        widths = (tuple(value.shape[name in self.longest :]) for name, value in self.null_text._asdict().items())
        return f"texts of {', '.join(' x '.join(map(str, width)) for width in widths if width)} channels"

    def null(self, cond: Any) -> Any:
        """The null text for as many samples, of the length of the longer one."""
        one = (_filled(null.to(value)[None], value) for null, value in zip(self.null_text, cond, strict=True))
        return self.kind(*(null.expand(len(cond[0]), *null.shape[1:]) for null in one))

    def is_null(self, cond: Any) -> Tensor:
        null = self.null(cond)
        alike = [(_filled(a, b) == b).flatten(1).all(1) for a, b in zip(cond, null, strict=True)]
        return torch.stack(alike).all(0)

    def stack(self, first: Any, second: Any) -> Any:
        """The shorter one is filled up."""
        pairs = zip(first, second, strict=True)
        return self.kind(*(torch.cat([_filled(a, b), _filled(b, a)]) for a, b in pairs))

    def dropped(self, cond: Any, among: Tensor | None = None) -> Any:
        if self.dropout <= 0:
            return cond
        chosen = self._chosen(len(cond[0]), cond[0].device, among)
        pairs = zip(self.null(cond), cond, strict=True)
        return self.kind(*(torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, _filled(b, a)) for a, b in pairs))

    def batch(self, texts: Sequence[Any]) -> Any:
        """Conditions of single samples as one of a batch, at least as long as the null text."""
        return batch_of(texts, self.null_text)

    def fitted(self, encoder: TextEncoder, prompts: Sequence[str]) -> list[Any]:
        """Prompts as conditions of single samples, cut (with a warning) to what the network reads.

        Raises `ConfigError` for an encoder that the network was not trained with.
        """
        return self._fitted(encoder, prompts, encoder.encode(prompts))

    def fitted_negative(self, encoder: TextEncoder, prompt: str) -> Any:
        """The same for the negative prompt."""
        return self._fitted(encoder, [prompt], [encoder.encode_negative(prompt)])[0]

    def _fitted(self, encoder: TextEncoder, prompts: Sequence[str], found: Sequence[Any]) -> list[Any]:
        null = self.null_text
        advice = "use the encoder that it was trained with"
        if found[0]._fields != null._fields:
            theirs, ours = ", ".join(found[0]._fields), ", ".join(null._fields)
            raise ConfigError(f"text_encoder={encoder.name} gives {theirs} and the network reads {ours}: {advice}.")
        for name, theirs, ours in zip(null._fields, found[0], null, strict=True):
            if theirs.shape[name in self.longest :] != ours.shape[name in self.longest :]:
                raise ConfigError(
                    f"text_encoder={encoder.name} has {theirs.shape[-1]} channels and the network reads "
                    f"{ours.shape[-1]}: {advice}."
                )
        return [self._cut(prompt, text) for prompt, text in zip(prompts, found, strict=True)]

    def _cut(self, prompt: str, text: Any) -> Any:
        for name, longest in self.longest.items():
            if len(getattr(text, name)) > longest:
                shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
                warnings.warn(
                    f"This network reads {longest} tokens of a prompt; the rest of '{shown}' is cut off.", stacklevel=3
                )
                text = text._replace(**{name: getattr(text, name)[:longest]})
        return text

    def request(
        self,
        n: int,
        classes: Any = None,
        prompts: Sequence[str] | None = None,
        negative: str | None = None,
        protocol: str = "balanced",
        seed: int = 0,
    ) -> Request:
        make_labels(protocol, n, 0, seed)  # its checks
        if classes is not None:
            raise ConfigError("This network is conditioned on text: give prompts instead of classes= (labels).")
        if not prompts:
            raise ConfigError(
                "This network is conditioned on text: give prompts; to a program, add prompts=FILE with one per line, "
                'or prompt="what to draw".'
            )
        return Texts(self, n, prompts, negative)


def batch_of(texts: Sequence[Any], *others: Any) -> Any:
    """Conditions of single samples, named tuples of tensors, as one of [B, ...].

    Sequences of unequal length are filled up with zeros: to the longest one, and that of the `others`.
    """
    found = []
    for values in zip(*texts, *others, strict=True):
        longest = max((value[None] for value in values), key=lambda value: value.shape[1] if value.ndim > 1 else 0)
        found.append(torch.cat([_filled(value[None], longest) for value in values[: len(texts)]]))
    return type(texts[0])(*found)


def _filled(values: Tensor, other: Tensor) -> Tensor:
    """[B, L, ...] with zeros behind, as long as another one; longer ones, and [B], as they are."""
    missing = other.shape[1] - values.shape[1] if values.ndim > 1 else 0
    return functional.pad(values, [0, 0] * (values.ndim - 2) + [0, missing]) if missing > 0 else values
