"""The VAE of a pipeline of diffusers as a codec, with the scale, shift and packing of the pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flowanchor.base.plain import bare
from flowanchor.base.stock_folder import without_code
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Posterior
from flowanchor.plugins.codecs.stock_vae import StockVAE

PIPELINE = "a pipeline of diffusers"


class Layout(ABC):
    """What a pipeline makes of the latents of one class of VAE. Sources: the pipelines that decode with it.

    Attributes:
        video: whether it reads frames; an image is one.
        squares: side of the squares of latents that are packed into channels.
        every: frames are one more than a multiple of this.
    """

    video: ClassVar[bool] = False
    squares: ClassVar[int] = 1
    every: ClassVar[int] = 1

    @abstractmethod
    def channels(self, config: Mapping[str, Any]) -> int:
        """Of the VAE's own latents; `config`: its `config.json`."""

    @abstractmethod
    def downsampling(self, config: Mapping[str, Any]) -> int:
        """Pixels per latent of the VAE along each side."""

    @abstractmethod
    def statistics(self, network: Any) -> tuple[Any, Any]:
        """Mean and deviation, numbers or per channel: a network reads (latent - mean) / deviation."""

    def encode(self, network: Any, images: Tensor) -> Posterior:
        """Images, or videos, in [-1, 1] -> the posterior of the VAE's own latents."""
        found = network.encode(images).latent_dist
        return Posterior(found.mean, found.logvar)

    def decode(self, network: Any, latents: Tensor) -> Tensor:
        """The VAE's own latents -> images or videos."""
        found: Tensor = network.decode(latents).sample
        return found


class KL(Layout):
    """SD3, FLUX.1, Z-Image, PixArt: (z - shift) scale."""

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config["latent_channels"])

    def downsampling(self, config: Mapping[str, Any]) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def statistics(self, network: Any) -> tuple[Any, Any]:
        return network.config.shift_factor or 0.0, 1 / network.config.scaling_factor


class Flux2(KL):
    """Squares of 2 x 2 into channels, then as its batch norm says."""

    squares = 2

    def statistics(self, network: Any) -> tuple[Any, Any]:
        return network.bn.running_mean, (network.bn.running_var + network.config.batch_norm_eps).sqrt()


class Listed(Layout):
    """Qwen-Image, Krea 2, Wan: mean and deviation per channel stand in the config."""

    video, every = True, 4

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config["z_dim"])

    def downsampling(self, config: Mapping[str, Any]) -> int:
        return int(config.get("scale_factor_spatial") or 2 ** len(config.get("temperal_downsample", (0, 1, 1))))

    def statistics(self, network: Any) -> tuple[Any, Any]:
        return network.config.latents_mean, network.config.latents_std


class DeepCompression(Layout):
    """Sana: scale alone, a latent without a posterior."""

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config["latent_channels"])

    def downsampling(self, config: Mapping[str, Any]) -> int:
        return int(2 ** (len(config["encoder_block_out_channels"]) - 1))

    def statistics(self, network: Any) -> tuple[Any, Any]:
        return 0.0, 1 / network.config.scaling_factor

    def encode(self, network: Any, images: Tensor) -> Posterior:
        return Posterior(network.encode(images).latent)


class LTXVideo(Layout):
    """Mean and deviation per channel, and a scale; the later ones are told that nothing is left of the noise."""

    video, every = True, 8

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config["latent_channels"])

    def downsampling(self, config: Mapping[str, Any]) -> int:
        halvings = config.get("spatio_temporal_scaling", (True, True, True, False))
        return int(config.get("spatial_compression_ratio") or config.get("patch_size", 4) * 2 ** sum(halvings))

    def statistics(self, network: Any) -> tuple[Any, Any]:
        return network.latents_mean, network.latents_std / network.config.scaling_factor

    def decode(self, network: Any, latents: Tensor) -> Tensor:
        told = latents.new_zeros(len(latents)) if network.config.timestep_conditioning else None
        found: Tensor = network.decode(latents, told).sample
        return found


class HunyuanVideo15(Layout):
    """Scale alone."""

    video, every = True, 4

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config["latent_channels"])

    def downsampling(self, config: Mapping[str, Any]) -> int:
        return int(config["spatial_compression_ratio"])

    def statistics(self, network: Any) -> tuple[Any, Any]:
        return 0.0, 1 / network.config.scaling_factor


KINDS: dict[str, Layout] = {
    "AutoencoderKL": KL(),
    "AutoencoderKLFlux2": Flux2(),
    "AutoencoderKLQwenImage": Listed(),
    "AutoencoderKLWan": Listed(),
    "AutoencoderDC": DeepCompression(),
    "AutoencoderKLLTXVideo": LTXVideo(),
    "AutoencoderKLHunyuanVideo15": HunyuanVideo15(),
}


class PipelineVAE(StockVAE):
    """Images [B, 3, H, W] or videos [B, 3, F, H, W] in [-1, 1] <-> latents [B, C, *] as the network reads them.

    Which VAE it is, its `config.json` says; nothing in the folder is executed. A VAE of videos takes an image as one
    frame, and latents of one frame decode to images.

    Args:
        weights: folder of the VAE (`config.json`, safetensors), or the pipeline that it is part of; None: the codec can
            be named, not used.
        dtype: of the arithmetic.
        chunk: images or videos per call of the network.
        tiling: whether large images are decoded in tiles, which costs a little quality.

    Raises:
        ConfigError: no such folder, sizes and numbers of frames that it cannot encode.
        CheckpointError: a VAE that is not known here, damaged files.
    """

    name = "pipeline"

    def __init__(
        self, weights: str | None = None, dtype: str = "bfloat16", chunk: int = 1, tiling: bool = False
    ) -> None:
        super().__init__(weights, PIPELINE, dtype, chunk, tiling)
        self.layout: Layout = KL()
        if self.folder is not None:
            self._describe(without_code(self.folder))

    def _describe(self, config: Mapping[str, Any]) -> None:
        found = KINDS.get(str(config.get("_class_name")))
        if found is None:
            raise CheckpointError(
                f"{self.folder} holds a {bare(str(config.get('_class_name')))}, not a VAE that is known here: "
                f"{', '.join(KINDS)}. Give the folder vae/ of {PIPELINE}."
            )
        self.layout = found
        try:
            self.latent_channels = found.channels(config) * found.squares**2
            self.downsampling = found.downsampling(config) * found.squares
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder} does not say its sizes ({bare(str(error))}): download its config.json again."
            ) from error

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        network, video = self._loaded(), self.layout.video
        given = latents[:, :, None] if video and latents.ndim == 4 else latents
        given = given[:, :, 0] if not video and given.ndim == 5 and given.shape[2] == 1 else given
        if given.ndim != 4 + video:
            raise ConfigError(
                f"Latents of shape {tuple(latents.shape)} are no images, which is all that this VAE decodes: set "
                "data.frames=1."
            )
        mean, deviation = self._statistics(given)
        raw = self._unpacked(given.float() * deviation + mean).to(self.dtype)
        parts = [self.layout.decode(network, part).float() for part in raw.split(self.chunk)]
        images = torch.cat(parts).clamp(-1, 1)
        return (images[:, :, 0] if video and images.shape[2] == 1 else images).to(latents.dtype)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Posterior:
        """Packed, not normalised, [B, C, h, w], or [B, C, f, h, w] of a VAE of videos."""
        video, every = self.layout.video, self.layout.every
        given = images[:, :, None] if video and images.ndim == 4 else images
        height, width = given.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise ConfigError(
                f"Images of {height} x {width} cannot be encoded by this VAE: both must be multiples of "
                f"{self.downsampling}: set captions.multiple, or image_size, to one."
            )
        if video and given.shape[2] % every != 1 % every:
            raise ConfigError(
                f"A video of {given.shape[2]} frames cannot be encoded by this VAE: use 1, {every + 1}, "
                f"{2 * every + 1}, ... frames."
            )
        network = self._loaded()
        found = [self.layout.encode(network, part.to(self.dtype)) for part in given.split(self.chunk)]
        spread = [one.logvar for one in found if one.logvar is not None]
        mean = self._packed(torch.cat([one.mean for one in found]).float())
        return Posterior(mean, self._packed(torch.cat(spread).float()) if spread else None)

    def _packed(self, latents: Tensor) -> Tensor:
        return functional.pixel_unshuffle(latents, self.layout.squares) if self.layout.squares > 1 else latents

    def _unpacked(self, latents: Tensor) -> Tensor:
        return functional.pixel_shuffle(latents, self.layout.squares) if self.layout.squares > 1 else latents

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layout.statistics(self._loaded())
        shape = (1, -1, *[1] * (like.ndim - 2))
        values = (torch.as_tensor(value, dtype=torch.float32, device=like.device).view(shape) for value in found)
        mean, deviation = values
        return mean, deviation

    def _read(self) -> Any:
        return self.read(KINDS, "a VAE that is known here", PIPELINE)
