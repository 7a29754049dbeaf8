"""Autoencoders of diffusers, read from local folders that choose no code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from flowanchor.base.plain import bare
from flowanchor.base.stock_folder import without_code
from flowanchor.base.trusted import brief
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.weights import check_finite

CONFIG = "config.json"


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
