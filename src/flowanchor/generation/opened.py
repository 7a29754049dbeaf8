"""One line to open a model, one to draw images:

model = flowanchor.load("outputs/train/NAME")
images = model.sample([0, 1, 2], steps=2, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields
from functools import cached_property
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.checkpoints.huggingface import local_folder
from flowanchor.checkpoints.load import LoadedModel, load_model
from flowanchor.codecs.load import load_codec
from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError
from flowanchor.generation.class_names import class_numbers
from flowanchor.generation.generator import Generator, Moment
from flowanchor.generation.prompts import load_text_encoder
from flowanchor.generation.samplers import build_sampler, check_sampler
from flowanchor.interfaces import Backbone, Codec, Sampler
from flowanchor.text.base import TextEncoder

Classes = int | str | Sequence[int | str] | Tensor | None


class Drawn(NamedTuple):
    """What `OpenedModel.sample(return_trajectory=True)` gives."""

    images: Tensor  # uint8 [N, H, W, C]
    trajectory: Tensor  # uint8 [S + 1, N, H, W, C]: the noise, the state after each step, the images


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

    @overload
    def sample(
        self, classes: Classes = ..., steps: int | None = ..., seed: int = ..., num_samples: int | None = ...,
        batch_size: int = ..., prompts: str | Sequence[str] | None = ..., negative: str | None = ...,
        size: tuple[int, int] | None = ..., *, labels: Classes = ..., noise: Tensor | None = ...,
        callback: Callable[[Moment], None] | None = ..., return_trajectory: Literal[False] = ...,
        sampler: Sampler | None = ..., **settings: Any,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def sample(
        self, classes: Classes = ..., steps: int | None = ..., seed: int = ..., num_samples: int | None = ...,
        batch_size: int = ..., prompts: str | Sequence[str] | None = ..., negative: str | None = ...,
        size: tuple[int, int] | None = ..., *, labels: Classes = ..., noise: Tensor | None = ...,
        callback: Callable[[Moment], None] | None = ..., return_trajectory: Literal[True],
        sampler: Sampler | None = ..., **settings: Any,
    ) -> Drawn: ...  # fmt: skip

    def sample(
        self,
        classes: Classes = None,
        steps: int | None = None,
        seed: int = 0,
        num_samples: int | None = None,
        batch_size: int = 64,
        prompts: str | Sequence[str] | None = None,
        negative: str | None = None,
        size: tuple[int, int] | None = None,
        *,
        labels: Classes = None,
        noise: Tensor | None = None,
        callback: Callable[[Moment], None] | None = None,
        return_trajectory: bool = False,
        sampler: Sampler | None = None,
        **settings: Any,
    ) -> Tensor | Drawn:
        """Draw images: uint8 [N, H, W, C] on the CPU. Image i depends on the seed, i and its class alone.

        Args:
            classes: one class per image, as its number or its name (`["sneaker", 3]`); None for every class in turn (or
                for a network without classes).
            steps: steps of the sampler; None for those that the network was trained to be sampled with.
            seed: of the noise.
            num_samples: how many, where `classes` do not say it; a single class is repeated so often.
            batch_size: of the network; the images do not depend on it.
            prompts: one per image, for a network of text; a single one is repeated `num_samples` times.
            negative: the negative prompt, where the sampler guides.
            size: height and width of the images, where the network draws any size.
            labels: `classes` by its earlier name.
            noise: what to begin with, [N, *] in the network's own space, in the place of that of the seed; noise that a
                sampler adds on its way is the seed's still.
            callback: told each `Moment` of each batch, the noise first and the data last.
            return_trajectory: give the images on their way, too, as `Drawn`.
            sampler: draws in the place of the network's own, such as `ConsistencySampler(steps=2)`.
            settings: other settings of its own sampler (`guidance_scale=1.5`), or another one (`_target_=...`).

        Raises:
            ConfigError: classes that it does not have, nothing that says how many, a sampler of the wrong kind, noise
                of another shape.
            DataError: an image that is not finite.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed={seed!r} must be a whole number, 0 or more.")
        if noise is not None and not isinstance(noise, Tensor):
            raise ConfigError(f"noise={noise!r} is no tensor: leave it out, or draw it with torch.randn.")
        if classes is not None and labels is not None:
            raise ConfigError("classes and labels are the same: give one of them.")
        asked = labels if classes is None else classes
        listed = [prompts] * (num_samples or 1) if isinstance(prompts, str) else prompts
        chosen = list(asked) if isinstance(asked, Iterator) else asked
        counted = [chosen] * (num_samples or 1) if isinstance(chosen, str) else chosen
        if noise is not None and num_samples is None and counted is None and listed is None:
            num_samples = len(noise)
        count = _how_many(counted if listed is None else listed, num_samples)
        conditioning = self.backbone.conditioning
        request = conditioning.request(count, class_numbers(counted, self.class_names), listed, negative)
        encoder = self.text_encoder if isinstance(conditioning, Text) else None
        generator = Generator(
            self.backbone, self.interval, self._sampler(sampler, {"steps": steps, **settings}), self.codec, encoder
        )
        way: dict[int, list[Tensor]] = {}

        def watch(moment: Moment) -> None:
            if callback is not None:
                callback(moment)
            if return_trajectory:
                way.setdefault(moment.step, []).append(generator.images(moment.samples))

        generator.watch = watch if return_trajectory or callback is not None else None
        images = torch.cat(list(generator.draw(request, seed, batch_size, size, noise=noise)))
        if not return_trajectory:
            return images
        return Drawn(images, torch.stack([torch.cat(parts) for _, parts in sorted(way.items())]))

    def _sampler(self, given: Sampler | None, settings: dict[str, Any]) -> Sampler:
        if given is None:
            return build_sampler(settings, self)
        typed = [name for name, value in settings.items() if value is not None]
        if typed:
            raise ConfigError(f"{typed[0]}= is a setting of the sampler, which you give as an object: set it there.")
        check_sampler(given, self.kind, self.interval)
        return given


def _how_many(given: Any, num_samples: int | None) -> int:
    """As many as are given one by one, else `num_samples`; a single label is repeated."""
    listed = isinstance(given, Sized) and not (isinstance(given, Tensor) and given.ndim == 0)
    count = len(given) if listed else num_samples if given is None else num_samples or 1
    if count is None or count < 1 or (listed and num_samples not in (None, count)):
        raise ConfigError("How many images? Give classes, one per image, or num_samples, not two different numbers.")
    return count


def load(
    path_or_repo: str | Path,
    ema: str | None = None,
    device: torch.device | str = "cpu",
    codec: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    initialise_from: str | Path | Mapping[str, str] | None = None,
    network: Backbone | None = None,
    base_lora: str | Path | None = None,
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
        network: a `Backbone` of your own that takes the weights; any other module as
            `PlainNetwork(module, sample_shape, classes)`, as it was trained.
        base_lora: where the LoRA lies that was merged into the weights under adapters, if not where the run found it.

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
    if network is not None and not isinstance(network, Backbone):
        raise ConfigError(
            "network= takes a Backbone: wrap another module in PlainNetwork(module, sample_shape, classes)."
        )
    model = load_model(
        local_folder(path_or_repo), ema, device, dtype, initialise_from, network=network, base_lora=base_lora
    )
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
