"""One line to open a model, one to draw images:

model = flowanchor.load("outputs/train/NAME")
images = model.sample([0, 1, 2], steps=2, seed=0)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import fields
from functools import cached_property
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.checkpoints.huggingface import local_folder
from flowanchor.checkpoints.load import LoadedModel, load_model
from flowanchor.codecs.load import load_codec
from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError
from flowanchor.generation.generator import Generator
from flowanchor.generation.prompts import load_text_encoder
from flowanchor.generation.samplers import build_sampler
from flowanchor.interfaces import Codec
from flowanchor.text.base import TextEncoder


class OpenedModel(LoadedModel):
    """A trained network that can be sampled, with its interval, sampler and codec."""

    @cached_property
    def codec(self) -> Codec:
        """From the network's samples to images; its weights are read on first use."""
        return load_codec(self).to(self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """From prompts to what a network of text is asked with; its weights are read on first use."""
        return load_text_encoder(self).to(self.device)

    def sample(
        self,
        labels: int | Sequence[int] | Tensor | None = None,
        steps: int | None = None,
        seed: int = 0,
        num_samples: int | None = None,
        batch_size: int = 64,
        prompts: str | Sequence[str] | None = None,
        negative: str | None = None,
        size: tuple[int, int] | None = None,
        **sampler: Any,
    ) -> Tensor:
        """Draw images: uint8 [N, H, W, C] on the CPU. Image i depends on the seed, i and its label alone.

        Args:
            labels: one class per image; None for every class in turn (or for a network without classes).
            steps: steps of the sampler; None for those that the network was trained to be sampled with.
            num_samples: how many, where `labels` do not say it; an int as `labels` is repeated so often.
            prompts: one per image, for a network of text; a single one is repeated `num_samples` times.
            negative: the negative prompt, where the sampler guides.
            size: height and width of the images, where the network draws any size.
            sampler: other settings of its sampler (`guidance_scale=1.5`), or another one (`_target_=...`).

        Raises:
            ConfigError: labels out of range, nothing that says how many, a sampler of the wrong kind.
            DataError: an image that is not finite.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed={seed!r} must be a whole number, 0 or more.")
        listed = [prompts] * (num_samples or 1) if isinstance(prompts, str) else prompts
        classes = list(labels) if isinstance(labels, Iterator) else labels
        count = _how_many(classes if listed is None else listed, num_samples)
        conditioning = self.backbone.conditioning
        request = conditioning.request(count, classes, listed, negative)
        encoder = self.text_encoder if isinstance(conditioning, Text) else None
        asked = build_sampler({"steps": steps, **sampler}, self)
        generator = Generator(self.backbone, self.interval, asked, self.codec, encoder)
        return torch.cat(list(generator.draw(request, seed, batch_size, size)))


def _how_many(given: Any, num_samples: int | None) -> int:
    """As many as are given one by one, else `num_samples`; a single label is repeated."""
    listed = isinstance(given, Sized) and not (isinstance(given, Tensor) and given.ndim == 0)
    count = len(given) if listed else num_samples if given is None else num_samples or 1
    if count is None or count < 1 or (listed and num_samples not in (None, count)):
        raise ConfigError("How many images? Give labels, one per image, or num_samples, not two different numbers.")
    return count


def load(
    path_or_repo: str | Path,
    ema: str | None = None,
    device: torch.device | str = "cpu",
    codec: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    initialise_from: str | Path | Mapping[str, str] | None = None,
) -> OpenedModel:
    """Open a model for sampling.

    Args:
        path_or_repo: a run folder, a .ckpt file, a sharded checkpoint, a .safetensors file or a folder that convert.py
            wrote; or the name `org/name` of a repository of the Hugging Face hub with the content of such a folder.
        ema: which weights, as in `flowanchor.checkpoints.load_model`.
        device: where it computes.
        codec: settings of its codec to replace: `{"weights": "vavae.pt"}` where the weights lie elsewhere here.
        text_encoder: the same of its text encoder.
        dtype: torch.bfloat16 for half the memory; None: float32.
        initialise_from: where the weights lie that adapters stand beside, if not where the run found them.

    Raises:
        CheckpointError: nothing there, a damaged or foreign file, a class that is not ours.
    """
    if not isinstance(path_or_repo, (str, PathLike)):
        raise ConfigError(f"Give a path or the name of a repository, not {path_or_repo!r}.")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype} is not known: use {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    if dtype == torch.float32:
        dtype = None
    for part, chosen in (("codec", codec), ("text_encoder", text_encoder)):
        if chosen is not None and not isinstance(chosen, Mapping):
            raise ConfigError(f"{part}= takes settings to replace, such as {{'weights': PATH}}, not {chosen!r}.")
    model = load_model(local_folder(path_or_repo), ema, device, dtype, initialise_from)
    values = {field.name: getattr(model, field.name) for field in fields(model)}
    for part, chosen in (("codec", codec), ("text_encoder", text_encoder)):
        own = model.config.get(part) or {}
        unknown = sorted(set(chosen or {}) - set(own))
        if unknown and not own:
            raise ConfigError(f"{model.path} has no {part} whose settings could be replaced.")
        if unknown:
            raise ConfigError(f"The {part} of {model.path} has no {', '.join(unknown)}: it has {', '.join(own)}.")
        if chosen:
            chosen = {key: str(value) if isinstance(value, PurePath) else value for key, value in chosen.items()}
            values["config"] = {**values["config"], part: {**own, **chosen}}
    return OpenedModel(**values)
