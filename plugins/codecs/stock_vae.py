"""Autoencoders of diffusers, read from local folders that choose no code."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.files import add_file
from flowanchor.base.plain import bare
from flowanchor.base.stock_folder import without_code
from flowanchor.base.trusted import brief
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Codec
from flowanchor.weights import check_finite

CONFIG = "config.json"


class StockVAE(Codec):
    """A VAE in a local folder, read when it is first asked.

    Args:
        weights: the folder `vae/` of a pipeline, or the pipeline's.
        pipeline: whose, in words.
        dtype: in which it computes: `float32`, `bfloat16`, `float16`.
        chunk: how many samples are decoded or encoded at once.
        tiling: whether large images are decoded in overlapping tiles.

    Raises `ConfigError` for a folder without a VAE, and for settings that are none.
    """

    def __init__(self, weights: str | None, pipeline: str, dtype: str, chunk: int, tiling: bool) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"codec.dtype={dtype} is not known: use one of {', '.join(DTYPES)}.")
        if chunk < 1:
            raise ConfigError(f"codec.chunk={chunk} must be at least 1: it is how many images are decoded at once.")
        self.dtype, self.chunk, self.tiling = DTYPES[dtype], chunk, tiling
        self.folder = None if weights is None else vae_folder(Path(weights).expanduser(), pipeline)
        self.usable = self.folder is not None
        self.network: Any = None
        # Follows `to(device)` before the network is read.
        self.register_buffer("_where", torch.empty(0), persistent=False)

    @abstractmethod
    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, to be broadcast."""

    def encode(self, images: Tensor) -> Tensor:
        raw = self.posterior(images).mean
        mean, deviation = self._statistics(raw)
        return ((raw - mean) / deviation).to(images.dtype)

    def fingerprint(self) -> str:
        if self.folder is None:
            return self.name
        digest = hashlib.sha256()
        for file in sorted(path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".json")):
            digest.update(file.name.encode())
            add_file(digest, file)
        return digest.hexdigest()

    @abstractmethod
    def _read(self) -> Any:
        """The network, by `read`."""

    def _loaded(self) -> Any:
        if self.network is None:
            self.network = self._read()
        return self.network

    def read(self, kinds: Collection[str], whose: str, pipeline: str) -> Any:
        """The network, where it computes; as `read_vae`."""
        if self.folder is None:
            raise ConfigError(f"codec={self.name} has no weights: add codec.weights=FOLDER (vae/ of {pipeline}).")
        network = read_vae(self.folder, kinds, self.dtype, whose, pipeline).to(self._where.device)
        if self.tiling:
            network.enable_tiling()
        return network


def vae_folder(path: Path, pipeline: str) -> Path:
    """The folder of a VAE: this one, or `vae/` in it; raises `ConfigError`. `pipeline`: whose, in words."""
    folder = path / "vae" if (path / "vae" / CONFIG).is_file() else path
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"There is no VAE in {path}: set codec.weights to the folder vae/ of {pipeline}, or to it.")
    return folder


def read_vae(folder: Path, kinds: Collection[str], dtype: torch.dtype, whose: str, pipeline: str) -> Any:
    """The frozen network of a folder, whose class is one of `kinds`; raises `CheckpointError`.

    `whose`, `pipeline`: which VAE of which pipeline is wanted, in words.
    """
    import diffusers  # heavy: codecs are named, and stored in checkpoints, where none is read

    name = without_code(folder).get("_class_name")
    if name not in kinds:
        raise CheckpointError(f"{folder} holds a {bare(str(name))}, not {whose}: give the folder vae/ of {pipeline}.")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no weights (*.safetensors): download them.")
    if name not in dir(diffusers):
        raise ConfigError(f"diffusers {diffusers.__version__} has no {name}: pip install --upgrade diffusers.")
    try:
        network: Any = getattr(diffusers, name).from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # whatever diffusers makes of another configuration, or of damaged files
        raise CheckpointError(f"{folder} cannot be read as {whose} ({brief(error)}): download it again.") from error
    check_finite(dict(network.named_parameters()), folder)
    return network.eval().requires_grad_(False)
