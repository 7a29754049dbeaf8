"""Streamed generation: uint8 images, chunk by chunk, each image a function of its own seed, index and condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowanchor.base.noise import renoiser, sample_noise
from flowanchor.base.pixels import to_uint8
from flowanchor.checkpoints.load import LoadedModel
from flowanchor.codecs.load import load_codec
from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError, DataError
from flowanchor.generation.prompts import load_text_encoder
from flowanchor.generation.samplers import build_sampler
from flowanchor.interfaces import Backbone, Codec, Interval, Sampler
from flowanchor.jumps.precision import asking, state_dtype
from flowanchor.request import Request
from flowanchor.text.base import TextEncoder


class Moment(NamedTuple):
    """A batch on its way from noise to data."""

    first: int  # number of its first sample among those that are drawn
    step: int  # of the way; 0: the noise
    time: float  # 0: noise, 1: data
    samples: Tensor  # [b, *], in the network's own space, float64


@dataclass
class Generator:
    """A network with all that is needed to draw images of what is asked for.

    Attributes:
        backbone, interval, sampler: how samples are drawn; noise and conditions go to where the backbone is.
        codec: from samples to pixels, on the same device.
        encoder: of prompts; None: the network reads none, or its requests are encoded already.
        strict: an image that is not finite is an error; else it becomes a black one.
        watch: told of every moment of every batch, the noise first and the data last.
    """

    backbone: Backbone
    interval: Interval
    sampler: Sampler
    codec: Codec
    encoder: TextEncoder | None = None
    strict: bool = True
    watch: Callable[[Moment], None] | None = None

    @classmethod
    def of(cls, model: LoadedModel, sampler: Any, codec: Any = None, text_encoder: Any = None) -> Generator:
        """Of an opened model, on its device; what is None is what the network was trained with.

        Raises `ConfigError` where that is not known, or does not fit the network.
        """
        chosen, images, device = build_sampler(sampler, model), load_codec(model, codec), model.device
        texts = isinstance(model.backbone.conditioning, Text)
        encoder = load_text_encoder(model, text_encoder).to(device) if texts else None
        return cls(model.backbone, model.interval, chosen, images.to(device), encoder)

    def draw(
        self,
        request: Request,
        seed: int,
        batch_size: int,
        size: str | Sequence[int] | None = None,
        first: int = 0,
        noise: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Images of a request in order, uint8 [b, H, W, C] on the CPU, `b` the batch size but for the last chunk.

        Image i depends on `seed`, `first + i` and its condition alone. A network that was loaded in a lower precision
        is asked under autocast; its samples are float32 all the same.

        Args:
            size: of the images, see `sample_shape`; None: the network's own.
            first: number of the first image, which decides the noise.
            noise: to begin with, [n, *], in the place of that of the seed.

        Raises:
            ConfigError: a size that the network cannot draw, videos, noise of another shape.
            DataError: while drawing, where an image is not finite (`strict`).
        """
        if batch_size < 1 or request.n < 1:
            raise ConfigError(f"num_samples={request.n} and batch_size={batch_size} must both be at least 1.")
        shape = sample_shape(self.backbone, size, self.codec.downsampling)
        if noise is not None and tuple(noise.shape) != (request.n, *shape):
            raise ConfigError(
                f"noise has the shape {list(noise.shape)}, and these samples need {[request.n, *shape]}: leave it out, "
                "or draw it with torch.randn."
            )
        return self._chunks(request, seed, batch_size, shape, first, noise)

    def _chunks(
        self, request: Request, seed: int, batch_size: int, shape: tuple[int, ...], first: int, given: Tensor | None
    ) -> Iterator[Tensor]:
        device, dtype = next(self.backbone.parameters()).device, state_dtype(self.backbone)
        for start in range(0, request.n, batch_size):
            stop = min(start + batch_size, request.n)
            indices = range(first + start, first + stop)
            cond = tree_map(
                lambda part: part.to(device) if isinstance(part, Tensor) else part,
                request.cond(start, stop, self.encoder),
            )
            noise = sample_noise(seed, indices, shape) if given is None else given[start:stop]
            noise = noise.to(device=device, dtype=dtype)
            fresh = renoiser(seed, indices, shape, device)
            self.sampler.watch = self._watcher(start)
            with asking(self.backbone, device):
                latents = self.sampler.sample(self.backbone, noise, cond, self.interval, fresh)
            images = self._decoded(latents)
            if self.strict:
                self._check_finite(images, request, start, first, seed)
            yield _as_uint8(images)

    def images(self, samples: Tensor) -> Tensor:
        """Samples [b, *] of the network's space, on its device -> uint8 [b, H, W, C] on the CPU."""
        return _as_uint8(self._decoded(samples))

    @torch.no_grad()
    def _decoded(self, samples: Tensor) -> Tensor:
        return self.codec.decode(one_image(samples.to(state_dtype(self.backbone))))

    def _watcher(self, first: int) -> Callable[[float, Tensor], None] | None:
        """What the sampler tells, with what it does not know: which samples these are, and how often it has told."""
        if self.watch is None:
            return None
        watch, told = self.watch, count()
        return lambda time, state: watch(Moment(first, next(told), time, state))

    def _check_finite(self, images: Tensor, request: Request, start: int, first: int, seed: int) -> None:
        good = images.isfinite().flatten(1).all(1)
        if not bool(good.all()):
            index = start + int((~good).nonzero()[0])
            raise DataError(
                f"Sample {first + index} (seed {seed}{request.named(index)}, NFE {self.sampler.nfe}) is not finite: "
                "the weights have diverged, or the codec overflows; try an earlier checkpoint, or codec.dtype=float32."
            )


def _as_uint8(images: Tensor) -> Tensor:
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu()


def one_image(latents: Tensor) -> Tensor:
    """Latents [B, C, 1, h, w] of one frame -> [B, C, h, w]; others as they are."""
    if latents.ndim == 5 and latents.shape[2] > 1:
        raise ConfigError(f"Samples of {latents.shape[2]} frames cannot be written as images: draw one frame.")
    return latents[:, :, 0] if latents.ndim == 5 else latents


def sample_shape(backbone: Backbone, size: str | Sequence[int] | None, downsampling: int) -> tuple[int, ...]:
    """Shape of one sample for images of a size, `"1024x768"` (width x height) or (height, width); None: the network's.

    Raises `ConfigError` for a network of one size, and for sizes that its patches do not divide.
    """
    if size is None:
        return tuple(backbone.sample_shape)
    if isinstance(size, str):
        numbers = size.lower().split("x")
        if len(numbers) != 2 or not all(number.strip().isdigit() for number in numbers):
            raise ConfigError(f"size={size} is no size: write width x height, for example size=1024x768.")
        width, height = (int(number) for number in numbers)
    else:
        height, width = (int(number) for number in size)
    if not backbone.any_size:
        raise ConfigError(f"This {type(backbone).__name__} draws one size only: leave out size=.")
    for side, multiple in zip((height, width), backbone.size_steps, strict=True):
        step = downsampling * multiple
        if side < step or side % step:
            raise ConfigError(f"size={width}x{height}: both sides must be multiples of {step}, and {side} is not.")
    return (*backbone.sample_shape[:-2], height // downsampling, width // downsampling)
