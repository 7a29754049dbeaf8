"""Checks of settings that every program makes before it starts anything."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from flowanchor.base.processes import local_rank, this_process
from flowanchor.errors import ConfigError

DEVICES = ("cpu", "cuda", "mps", "xpu")
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_whole_numbers(cfg: DictConfig, **least: int | tuple[int, int]) -> None:
    """Raise `ConfigError` for the first setting that is no whole number, or below its least value.

    Names write a dot as two underscores (`data__batch_size`); a pair is the least value and one to suggest. A setting
    that is null, or that the configuration does not have (a plugin's data may know no workers), is not looked at.
    """
    for name, limit in least.items():
        bound, example = limit if isinstance(limit, tuple) else (limit, limit)
        key = name.replace("__", ".")
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{key}={value} is not a whole number: use for example {key}={example}.")
        if value < bound:
            raise ConfigError(f"{key}={value} is too small: it must be at least {bound} (for example {key}={example}).")


def own_device(name: Any) -> str:
    """The device of this process: a GPU of its own, where torchrun started several."""
    device = choose_device(name)
    local, (_, count) = local_rank(), this_process()
    return f"cuda:{local}" if device == "cuda" and count > 1 and local is not None else device


def choose_device(name: Any) -> str:
    """A device that PyTorch can use; `auto` or null is the GPU where there is one."""
    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    name = str(name)
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise ConfigError(f"device={name} is not known: use device=cpu, device=cuda or leave it out.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: this machine has no CUDA device that PyTorch can use; use device=cpu.")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cuda.")
    return name


def base_of_adapters(cfg: DictConfig) -> Any:
    """Where the weights lie that a run's adapters stand beside: a path, or one for each part; None: as the run says."""
    found = cfg.get("initialise_from")
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def choose_dtype(name: Any) -> torch.dtype | None:
    """In which the weights of a network that is sampled are stored; None for float32."""
    if name in (None, "float32"):
        return None
    if name not in LOW:
        raise ConfigError(f"dtype={name} is not known: use bfloat16, float16, or leave it out for float32.")
    return LOW[name]
