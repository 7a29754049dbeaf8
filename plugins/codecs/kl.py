"""KL autoencoders (VA-VAE, Stable Diffusion's) as codecs, on `diffusers.AutoencoderKL`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.plain import bare, read_json
from flowanchor.base.seal import write_sealed
from flowanchor.base.torch_files import read_torch
from flowanchor.base.trusted import brief
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Codec, Posterior
from flowanchor.plugins.codecs.kl_keys import autoencoder_weights, infer_architecture
from flowanchor.weights import check_finite, kind_of, whole_tensor

FOLDER_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")

UNSEEN = {"norm_num_groups": int, "act_fn": str}  # settings of an autoencoder that change no weight's shape

log = logging.getLogger(__name__)


class KLCodec(Codec):
    """Images [B, 3, H, W] in [-1, 1] <-> normalised latents [B, C, H / f, W / f].

    Its architecture (channels, levels, where attention is) follows from the weights. They are read when they are first
    needed, so that training on latents takes no memory for them; without a file the codec can be named, not used.

    Args:
        name: `vavae` or `sd_vae`; for messages and manifests.
        weights: the released `.pt` (read without unpickling code), a `.safetensors` file in the original or diffusers'
            layout, one of `save`, or a folder of diffusers with `config.json`.
        latent_channels, downsampling: what is expected of the weights (C and f above).
        statistics: what the latents are normalised with: a `latents_stats.pt`, numbers, or null (not at all). Training
            on encoded data fills in those of the data.
        dtype: of the arithmetic: float32, bfloat16 or float16.
        chunk: images per call of the network, to bound its memory.

    Raises:
        ConfigError: no such file, an unknown dtype, images whose size the codec does not divide.
        CheckpointError: a file that holds other weights.
    """

    def __init__(
        self,
        name: str,
        latent_channels: int,
        downsampling: int,
        weights: str | None = None,
        statistics: Any = None,
        dtype: str = "float32",
        chunk: int = 32,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"codec.dtype={dtype} is not known: use one of {', '.join(DTYPES)}.")
        if chunk < 1:
            raise ConfigError(f"codec.chunk={chunk} must be at least 1: it is how many images are decoded at once.")
        self.name, self.latent_channels, self.downsampling = name, latent_channels, downsampling
        self.path = None if weights is None else Path(weights).expanduser()
        if self.path is not None and not self.path.exists():
            raise ConfigError(f"There is no file {self.path}: add codec.weights=FILE with the weights of {name}.")
        self.statistics = LatentStatistics.read(statistics)
        self.statistics.check(latent_channels, "codec.statistics")
        self.dtype, self.chunk = DTYPES[dtype], chunk
        self.usable = self.path is not None
        self.network: nn.Module | None = None
        self._fingerprint: str | None = None
        # Follows `to(device)` before there is a network.
        self.register_buffer("_where", torch.empty(0), persistent=False)

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], name: str = "vavae", **settings: Any) -> KLCodec:
        """A codec of weights in memory, in either layout."""
        weights, _ = autoencoder_weights(state)
        architecture = infer_architecture(weights)
        levels = len(architecture["block_out_channels"])
        codec = cls(name, _latent_channels(weights, architecture), 2 ** (levels - 1), **settings)
        codec.network, codec.usable = _build(weights, architecture, codec.dtype), True
        return codec

    # -------------------------------------------------------------------------------------------- images and latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        raw = self.statistics.denormalise(latents.float())
        network = self._loaded()
        images = [network.decode(part.to(self.dtype)).sample.float() for part in raw.split(self.chunk)]  # type: ignore[operator]
        return torch.cat(images).to(latents.dtype)

    def encode(self, images: Tensor) -> Tensor:
        return self.statistics.normalise(self.posterior(images).mean).to(images.dtype)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Posterior:
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise ConfigError(
                f"Images of {height} x {width} cannot be encoded by {self.name}: both must be multiples of "
                f"{self.downsampling}."
            )
        network: Any = self._loaded()
        moments = [
            network.quant_conv(hidden) if network.quant_conv is not None else hidden
            for part in images.split(self.chunk)
            for hidden in [network.encoder(part.to(self.dtype))]
        ]
        mean, logvar = torch.cat(moments).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    # ------------------------------------------------------------------------------------------------------- weights

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            weights = self._loaded().state_dict()
            if self.path is not None:  # as they are stored, whatever type they are used in
                weights, _ = autoencoder_weights(read_weights(self.path))
            digest = hashlib.sha256()
            for name, tensor in sorted(weights.items()):
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save(self, path: Path) -> None:
        """Write the weights as a .safetensors file that `weights=` reads, under diffusers' names."""
        weights = {key: value.detach().cpu().contiguous() for key, value in self._loaded().state_dict().items()}
        write_sealed(path, weights, {"codec": json.dumps({"name": self.name})})

    def _loaded(self) -> nn.Module:
        if self.network is None:
            if self.path is None:
                raise ConfigError(
                    f"codec={self.name} has no weights to encode or decode with: add codec.weights=FILE, the released "
                    "autoencoder."
                )
            weights, ignored = autoencoder_weights(read_weights(self.path))
            _check_numbers(weights, self.path)
            if ignored:
                shown = ", ".join(sorted({key.split(".")[0] for key in ignored}))
                log.info(
                    "%s: %d tensors are none of the autoencoder and were left out (%s).", self.path, len(ignored), shown
                )
            self.network = self._checked(weights)
        # Modules are moved with the codec; what it was loaded on is where it stands now.
        return self.network.to(cast(Tensor, self._where).device)

    def _checked(self, weights: dict[str, Tensor]) -> nn.Module:
        try:
            architecture = infer_architecture(weights)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        except (
            IndexError,
            TypeError,
        ) as error:  # tensors of other dimensions than the convolutions that they are named
            raise CheckpointError(f"{self.path} holds no autoencoder ({error}): use the released weights.") from error
        found = (_latent_channels(weights, architecture), 2 ** (len(architecture["block_out_channels"]) - 1))
        if found != (self.latent_channels, self.downsampling):
            raise CheckpointError(
                f"{self.path} holds an autoencoder with {found[0]} latent channels and downsampling {found[1]}, and "
                f"codec={self.name} is set to {self.latent_channels} and {self.downsampling}: use its own weights, or "
                f"set codec.latent_channels={found[0]} codec.downsampling={found[1]}."
            )
        try:
            return _build(weights, architecture | folder_settings(self.path), self.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        except Exception as error:  # diffusers refuses sizes in its own words
            raise CheckpointError(
                f"{self.path} holds no autoencoder that diffusers can build ({brief(error)}): use the released weights."
            ) from error


def folder_settings(path: Path | None) -> dict[str, Any]:
    """What a folder of diffusers says of its autoencoder that no weight tells: groups of the norms, the activation."""
    config = None if path is None else path / "config.json"
    if config is None or not config.is_file():
        return {}
    found = read_json(config)
    settings = {name: found[name] for name in UNSEEN if isinstance(found, dict) and name in found}
    for name, value in settings.items():
        if type(value) is not UNSEEN[name]:
            raise CheckpointError(f"{config} has {name}={bare(value)}, which is no setting of an autoencoder.")
    return settings


def _check_numbers(weights: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in weights.items():
        if kind_of(whole_tensor(tensor, f"{path}: {name}").dtype) != "floating":
            raise CheckpointError(f"{path} has other numbers than floating-point ones in {name}: do not use it.")
    check_finite(weights, path)


def read_weights(path: Path) -> Mapping[str, Any]:
    """The state dict of a file or of a folder of diffusers; nothing in it is run. Raises `CheckpointError`."""
    if path.is_dir():
        inside = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if inside is None:
            raise CheckpointError(f"The folder {path} holds no {FOLDER_FILES[0]}: give the folder of a diffusers VAE.")
        path = inside
    if not path.is_file():  # a pipe would never end
        raise CheckpointError(f"There is no file {path}: give the weights of an autoencoder.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = read_torch(path)
    except PermissionError:
        raise
    except Exception as error:  # damaged files make PyTorch raise almost anything
        raise CheckpointError(
            f"{path} cannot be read safely as weights ({type(error).__name__}): it is incomplete, or holds more than "
            "tensors and plain values."
        ) from error
    for name in ("state_dict", "model", "ema"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no state dict: give the weights of an autoencoder.")
    return {str(key).removeprefix("module."): value for key, value in dict.items(content)}


def _latent_channels(weights: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> int:
    """Channels of the latents: those between the two 1 x 1 convolutions, where there are any."""
    post = weights.get("post_quant_conv.weight")
    return int(post.shape[1]) if post is not None else int(architecture["latent_channels"])


def _build(weights: Mapping[str, Tensor], architecture: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderKL  # takes seconds to import
    from diffusers.models.resnet import ResnetBlock2D

    with torch.device("meta"):
        network: Any = AutoencoderKL(**architecture)
        for name in ("quant_conv", "post_quant_conv"):  # LDM allows another number of channels between the two
            if f"{name}.weight" in weights:
                out_channels, in_channels = weights[f"{name}.weight"].shape[:2]
                setattr(network, name, nn.Conv2d(in_channels, out_channels, 1))
        first, width = weights["encoder.conv_in.weight"].shape[0], architecture["block_out_channels"][0]
        if first != width:  # LDM's first level may be wider than what comes into it
            network.encoder.conv_in = nn.Conv2d(architecture["in_channels"], first, 3, padding=1)
            widening: dict[str, Any] = {"in_channels": first, "out_channels": width, "temb_channels": None, "eps": 1e-6}
            network.encoder.down_blocks[0].resnets[0] = ResnetBlock2D(**widening)
    ours = network.state_dict()
    missing, unknown = sorted(ours.keys() - weights.keys()), sorted(weights.keys() - ours.keys())
    reshaped = [key for key in ours if key in weights and ours[key].shape != weights[key].shape]
    for what, keys in (("lack", missing), ("have the unknown", unknown), ("have another shape of", reshaped)):
        if keys:
            raise CheckpointError(f"These are not the weights of a KL autoencoder: they {what} {', '.join(keys[:3])}.")
    network.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, strict=True, assign=True)
    return cast(nn.Module, network.eval().requires_grad_(False))
