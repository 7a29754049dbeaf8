"""Released files in miniature: the layouts as their training programs write them, from the golden files' weights."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden"
State = dict[str, Tensor]


def golden(name: str) -> tuple[State, dict[str, Tensor], dict[str, Any]]:
    """Weights under the released names, inputs and outputs of the authors' network, its settings."""
    with safe_open(GOLDEN / f"backbone_{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return state, {key: value for key, value in tensors.items() if not key.startswith("state.")}, config


def shifted(state: State, by: float) -> State:
    """Other weights of the same network."""
    return {key: value if "freqs" in key or key == "pos_embed" else value + by for key, value in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def optimizer(state: State) -> dict[str, Any]:
    """What AdamW's state_dict looks like."""
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)} for i, _ in enumerate(state)}
    return {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": list(moments)}]}


def stage_two(narrow: State, wide: State, raw: State, sigma_rel: float = 0.2, step: int = 40) -> dict[str, Any]:
    """FACM's stage 2 as its training saves it: the state of a PostHocEMA beside the wrapped network."""
    emas: dict[str, Tensor] = {}
    for index, state in enumerate((narrow, wide)):
        emas[f"ema_models.{index}.initted"] = torch.tensor(True)
        emas[f"ema_models.{index}.step"] = torch.tensor(step)
        emas.update(prefixed(state, f"ema_models.{index}.ema_model."))
    args = argparse.Namespace(sigma_rel=sigma_rel, max_steps=math.inf, ckpt_path=None, distill=True)
    return {
        "model": prefixed(raw, "module."), "emas": emas, "opt": optimizer(raw), "args": args, "epoch": 2, "step": step,
        "scheduler": {},
    }  # fmt: skip


def stage_one(ema: State, raw: State) -> dict[str, Any]:
    """FACM's stage 1 and LightningDiT: one average, the network of DistributedDataParallel, a config of OmegaConf."""
    from omegaconf import OmegaConf

    config = OmegaConf.create({"model": {"model_type": "LightningDiT-XL/1", "in_chans": 4}, "train": [1, 2.5, None]})
    return {"model": prefixed(raw, "module."), "ema": ema, "opt": optimizer(raw), "config": config}


def extracted(state: State) -> dict[str, Any]:
    """What the authors' extraction tool leaves of stage 2."""
    return {"ema": state, "_extracted_from": "PostHocEMA"}
