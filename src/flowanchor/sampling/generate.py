"""Streamed generation: uint8 images, chunk by chunk, each image a function of its own seed, index and label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.noise import renoiser, sample_noise
from flowanchor.base.pixels import to_uint8
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Backbone, Codec, Interval, Sampler
from flowanchor.sampling.precision import asking, state_dtype


def generate(
    backbone: Backbone,
    interval: Interval,
    sampler: Sampler,
    codec: Codec,
    labels: Tensor | None,
    seed: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    num_samples: int | None = None,
    start: int = 0,
    shape: tuple[int, ...] | None = None,
    finite: bool = False,
) -> Iterator[Tensor]:
    """Yield uint8 images [b, H, W, C] on the CPU, in order; image i depends only on (seed, start + i, labels[i]).

    `labels`: classes [N] or text embeddings [N, L, D]; None for unconditional networks, where `num_samples` gives N.
    `shape`: of one sample in the network's space; None: the network's own. A network that was loaded in a lower
    precision is asked under autocast; its samples are float32 all the same.
    `finite`: raise `DataError` at an image that is not; else it becomes a black one.
    """
    if labels is None and num_samples is None:
        raise ConfigError("Nothing says how many images to generate: set num_samples.")
    total = num_samples if num_samples is not None else len(labels)  # type: ignore[arg-type]
    if batch_size < 1 or total < 1:
        raise ConfigError(f"num_samples={total} and batch_size={batch_size} must both be at least 1.")
    dtype = state_dtype(backbone)
    shape = backbone.sample_shape if shape is None else shape
    for first in range(0, total, batch_size):
        indices = range(start + first, start + min(first + batch_size, total))
        cond = None if labels is None else labels[first : first + batch_size].to(device)
        noise = sample_noise(seed, indices, shape).to(device=device, dtype=dtype)
        fresh = renoiser(seed, indices, shape, device)
        with asking(backbone, device):
            latents = sampler.sample(backbone, noise, cond, interval, fresh)
        with torch.no_grad():
            images = codec.decode(one_image(latents.to(dtype)))
        if finite:
            _check_finite(images, start + first, seed)
        yield to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu()


def _check_finite(images: Tensor, first: int, seed: int) -> None:
    good = images.isfinite().flatten(1).all(1)
    if not bool(good.all()):
        raise DataError(
            f"Sample {first + int((~good).nonzero()[0])} (seed {seed}) is not finite: the weights have diverged, or "
            "the codec overflows; try an earlier checkpoint, or codec.dtype=float32."
        )


def one_image(latents: Tensor) -> Tensor:
    """Latents [B, C, 1, h, w] of one frame -> [B, C, h, w]; others as they are."""
    if latents.ndim == 5 and latents.shape[2] > 1:
        raise ConfigError(f"Samples of {latents.shape[2]} frames cannot be written as images: draw one frame.")
    return latents[:, :, 0] if latents.ndim == 5 else latents


def build_sampler(settings: Any, model: Any) -> Sampler:
    """A sampler from a config group, checked against what the loaded model was trained for.

    A group without `_target_` (`sampler=from_checkpoint`) takes the sampler that the checkpoint was trained with, and
    lays the settings that are not null over it.
    """
    from flowanchor.checkpoints.trusted import build

    chosen = _given(settings)
    if "_target_" in chosen:  # the user's own choice
        from hydra.utils import instantiate

        sampler: Sampler = instantiate(chosen, _convert_="all")
    else:
        own = model.config.get("sampler")
        if not own:
            raise ConfigError(
                f"{model.path} does not say how it is sampled: add for example sampler=flow sampler.steps=40 "
                "sampler.guidance_scale=4."
            )
        sampler = build(own, "sampler", model.path, chosen)
    check_sampler(sampler, model.kind, model.interval)
    return sampler


def sampler_settings(settings: Any, model: Any) -> dict[str, Any]:
    """What `build_sampler` builds from, for a record: the checkpoint's settings under those that were chosen."""
    chosen = _given(settings)
    return chosen if "_target_" in chosen else {**(model.config.get("sampler") or {}), **chosen}


def _given(settings: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    typed: Any = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else dict(settings)
    return {key: value for key, value in typed.items() if value is not None}


def check_sampler(sampler: Sampler, kind: str, interval: Interval) -> None:
    """Raise `ConfigError` for a sampler that asks the network what it never learned."""
    if sampler.needs_end and not interval.tells_end:
        raise ConfigError(
            f"sampler=meanflow asks for averages between any two times, and {type(interval).__name__} cannot tell the "
            "network where they end: use sampler=consistency, or train with objective/interval=auxiliary."
        )
    if sampler.kind == "shortcut" and kind == "flow":
        raise ConfigError(
            "This network was trained as a flow model and has no shortcut to jump along: use sampler=flow, "
            "or distil it first with objective=facm teacher=checkpoint teacher.checkpoint=PATH."
        )
