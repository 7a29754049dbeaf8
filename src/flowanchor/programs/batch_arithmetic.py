"""How many samples a step has, over all processes, and whether that is what the recipe means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from flowanchor.base.processes import process_count
from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.errors import ConfigError
from flowanchor.programs.checks import check_whole_numbers


def check_batch(cfg: DictConfig) -> None:
    """Compare `data.batch_size` x processes x `trainer.accumulate_grad_batches` with what the settings promise.

    Raises `ConfigError` where `global_batch_size` is set and is not that, or where a setting is no count; warns where
    the learning rate is stated for another batch (`reference_batch_size`).
    """
    check_whole_numbers(cfg, global_batch_size=(1, 1024), reference_batch_size=(1, 1024))
    check_whole_numbers(cfg, trainer__num_nodes=1, trainer__accumulate_grad_batches=1)
    batch = OmegaConf.select(cfg, "data.batch_size")
    if batch is None:
        return
    accumulated = int(cfg.trainer.get("accumulate_grad_batches") or 1)
    processes = count_processes(cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1), cfg.trainer.accelerator)
    samples = int(batch) * processes * accumulated
    wanted = cfg.get("global_batch_size")
    if wanted is not None and int(wanted) != samples:
        raise ConfigError(
            f"A step has {samples} samples: data.batch_size={batch} x {processes} "
            f"process{'es' if processes > 1 else ''} x trainer.accumulate_grad_batches={accumulated}, and "
            f"global_batch_size={wanted}: {_suggestions(int(wanted), int(batch), processes, accumulated)}."
        )
    reference = cfg.get("reference_batch_size")
    rate = OmegaConf.select(cfg, "optimizer.lr")
    if reference and isinstance(rate, int | float) and samples != int(reference):
        ratio = samples / int(reference)
        rank_zero_warn(
            f"optimizer.lr={rate:g} is stated for a batch of {reference} and a step of this run has {samples}: scaled "
            f"it is {rate * ratio**0.5:.2g} (by the square root, usual for AdamW) or {rate * ratio:.2g} (linearly); "
            f"reference_batch_size={samples} says that it is meant so."
        )


def check_epoch(batches: float, accumulated: int, wanted: int | None) -> None:
    """Look whether the trainer's epochs hold whole optimizer steps: it ends a step where an epoch ends.

    The data modules see to that (`EpochBatchSampler.accumulate`); `trainer.limit_train_batches` and loaders of others
    may not. Raises `ConfigError` where `wanted` (`global_batch_size`) promises more than such a step gets, else warns.
    """
    if batches == float("inf") or batches % accumulated == 0:
        return
    sentence = (
        f"An epoch has {batches} batches, no multiple of trainer.accumulate_grad_batches={accumulated}: its last "
        f"step would have {int(batches) % accumulated} of them; set trainer.limit_train_batches to a multiple."
    )
    if wanted is not None:
        raise ConfigError(sentence)
    rank_zero_warn(sentence)


def count_processes(devices: Any, num_nodes: int, accelerator: str) -> int:
    """Processes of the run as Lightning will start them, or as a launcher already has."""
    launched = os.environ.get("TORCHELASTIC_RUN_ID") is not None or os.environ.get("SLURM_NTASKS") is not None
    written = process_count()
    if launched and written:
        return written
    count = _devices(devices, accelerator)
    if count < 1:
        raise ConfigError(f"trainer.devices={devices} is no number of devices: use for example 8 or auto.")
    return count * int(num_nodes)


def _devices(devices: Any, accelerator: str) -> int:
    """Devices of one machine; below 1 where that is not what was asked for."""
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    text = str(devices).strip()
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("auto", "-1"):
        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.cuda.device_count() if on_gpu else 1
    return int(text) if text.isdecimal() else 0


def _suggestions(wanted: int, batch: int, processes: int, accumulated: int) -> str:
    ways = []
    if wanted % (processes * accumulated) == 0:
        ways.append(f"data.batch_size={wanted // (processes * accumulated)}")
    if wanted % (batch * processes) == 0:
        ways.append(f"trainer.accumulate_grad_batches={wanted // (batch * processes)}")
    if wanted % (batch * accumulated) == 0:
        ways.append(f"{wanted // (batch * accumulated)} processes (trainer.devices, trainer.num_nodes)")
    ways.append("global_batch_size=null, which asks for nothing")
    return f"use {', or '.join(ways)}"
