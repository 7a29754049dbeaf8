"""Wan's VAE as a codec, on `diffusers.AutoencoderKLWan`: images and videos, 8 (or 16) times smaller, 4 in time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Posterior
from flowanchor.plugins.codecs.stock_vae import StockVAE

KINDS = ("AutoencoderKLWan",)
PIPELINE = "a Wan pipeline"


class WanVAE(StockVAE):
    """Images [B, 3, H, W] or videos [B, 3, F, H, W] in [-1, 1] <-> normalised latents [B, C, f, H / s, W / s].

    Latents are normalised by the mean and deviation per channel that the VAE's own config states, as Wan's pipeline
    does. An image is a video of one frame; latents of one frame, with or without that dimension, decode to images.

    Args:
        weights: folder of the VAE (`config.json`, safetensors), or the pipeline that it is part of; None: the codec can
            be named, not used.
        latent_channels, downsampling: C and s, checked against the weights.
        dtype: of the arithmetic.
        chunk: images or videos per call of the network.
        tiling: whether large images are decoded in tiles, which costs a little quality.

    Raises:
        ConfigError: no such folder, sizes that are no multiples of s, frames that are not 4 k + 1.
        CheckpointError: another network.
    """

    name = "wan_vae"

    def __init__(
        self,
        weights: str | None = None,
        latent_channels: int = 16,
        downsampling: int = 8,
        dtype: str = "bfloat16",
        chunk: int = 1,
        tiling: bool = False,
    ) -> None:
        super().__init__(weights, PIPELINE, dtype, chunk, tiling)
        self.latent_channels, self.downsampling = latent_channels, downsampling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        network, still = self._loaded(), latents.ndim == 4
        video = latents[:, :, None] if still else latents
        mean, std = self._statistics(video)
        raw = (video.float() * std + mean).to(self.dtype)
        images = torch.cat([network.decode(part).sample.float() for part in raw.split(self.chunk)]).clamp(-1, 1)
        return (images[:, :, 0] if still or images.shape[2] == 1 else images).to(latents.dtype)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Posterior:
        """Raw, [B, C, f, h, w]."""
        video = images[:, :, None] if images.ndim == 4 else images
        frames, height, width = video.shape[2:]
        if height % self.downsampling or width % self.downsampling:
            raise ConfigError(
                f"Images of {height} x {width} cannot be encoded by {self.name}: both must be multiples of "
                f"{self.downsampling} (16 for the network)."
            )
        if frames % 4 != 1:
            raise ConfigError(f"A video of {frames} frames cannot be encoded by {self.name}: use 1, 5, 9, ... frames.")
        network = self._loaded()
        found = [network.encode(part.to(self.dtype)).latent_dist for part in video.split(self.chunk)]
        return Posterior(
            torch.cat([one.mean for one in found]).float(), torch.cat([one.logvar for one in found]).float()
        )

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self._loaded().config
        shape = (1, -1, 1, 1, 1)
        values = (torch.tensor(config[name], device=like.device) for name in ("latents_mean", "latents_std"))
        mean, std = (value.view(shape) for value in values)
        return mean, std

    def _read(self) -> Any:
        network = self.read(KINDS, "Wan's VAE", PIPELINE)
        config = network.config
        theirs = (config.z_dim, getattr(config, "scale_factor_spatial", None) or self.downsampling)
        if theirs != (self.latent_channels, self.downsampling):
            raise ConfigError(
                f"{self.folder} has latents of {theirs[0]} channels, {theirs[1]} times smaller: set codec."
                f"latent_channels={theirs[0]} codec.downsampling={theirs[1]}."
            )
        return network
