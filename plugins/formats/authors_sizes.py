"""The architecture behind a state dict with LightningDiT's key names, read off its names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowanchor.checkpoints.fit import sides
from flowanchor.errors import CheckpointError

PACKAGE = "flowanchor.plugins.backbones"
CLASSES = {"lightningdit": "lightningdit.LightningDiT", "sit": "sit.SiT", "dit": "dit.DiT"}

# Heads of the released sizes, by hidden size: DiT's S, B, L, XL and LightningDiT's 1p0B, 1p6B.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


def infer_backbone(
    weights: Mapping[str, Tensor],
    backbone: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """The `backbone` entry of a configuration for these weights.

    Args:
        backbone: `lightningdit`, `sit` or `dit`: the plain layers of all three have the same names and shapes.
        num_heads: needed where neither a norm of the keys, rotary tables nor a released size tells.
        num_classes: null: one less than the rows of the label table, whose last row is the null class.

    Raises:
        CheckpointError: other weights, or a setting that they do not tell and that is not given.
    """
    if backbone is not None and backbone not in CLASSES:
        raise CheckpointError(f"backbone={backbone} is not known here: use one of {', '.join(CLASSES)}.")
    sizes = _sizes(weights)
    switches = _switches(weights, sizes)
    if backbone is None:
        if not any(switches[name] for name in ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")):
            raise CheckpointError(
                "These weights have the plain layers that DiT, SiT and LightningDiT share, and nothing in them tells "
                "which they are: add backbone=sit, backbone=dit or backbone=lightningdit."
            )
        backbone = "lightningdit"
    config = {
        "_target_": f"{PACKAGE}.{CLASSES[backbone]}",
        **sizes,
        "num_heads": num_heads or _heads(weights, sizes["hidden_size"]),
        **_classes(weights, num_classes),
    }
    # SiT and DiT are LightningDiT without most of its switches, and may not know those that are off.
    known = {name: on for name, on in switches.items() if on or name == "learn_sigma" or backbone == "lightningdit"}
    return {**config, **known}


def _get(weights: Mapping[str, Tensor], name: str, dims: int) -> torch.Size:
    if name not in weights:
        raise CheckpointError(
            f"These are not the weights of a LightningDiT, SiT or DiT: they have no {name} "
            f"(but for instance {', '.join(list(weights)[:3]) or 'nothing'})."
        )
    shape = weights[name].shape
    if len(shape) != dims:
        raise CheckpointError(f"{name} has shape {sides(shape)}, and {dims} dimensions were expected.")
    return shape


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    hidden, channels, patch, _ = _get(weights, "x_embedder.proj.weight", 4)
    tokens = _get(weights, "pos_embed", 3)[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"pos_embed has {tokens} positions, which is no square grid.")
    blocks = {int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    if not blocks:
        raise CheckpointError("These weights have no blocks: they are not those of a LightningDiT, SiT or DiT.")
    return {
        "input_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": 1 + max(blocks),
        "mlp_ratio": _mlp_ratio(weights, hidden),
    }


def _switches(weights: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, bool]:
    width = sizes["patch_size"] ** 2 * sizes["in_channels"]
    return {
        "use_qknorm": "blocks.0.attn.q_norm.weight" in weights,
        "use_swiglu": "blocks.0.mlp.w12.weight" in weights,
        "use_rope": "feat_rope.freqs_cos" in weights,
        "use_rmsnorm": "blocks.0.norm1.weight" in weights,
        "wo_shift": _get(weights, "blocks.0.adaLN_modulation.1.weight", 2)[0] == 4 * sizes["hidden_size"],
        "learn_sigma": _get(weights, "final_layer.linear.weight", 2)[0] == 2 * width,
        "auxiliary_time_cond": any(key.startswith("r_embedder.") for key in weights),
    }


def _mlp_ratio(weights: Mapping[str, Tensor], hidden: int) -> float:
    if "blocks.0.mlp.fc1.weight" in weights:
        return weights["blocks.0.mlp.fc1.weight"].shape[0] / hidden
    inner = _get(weights, "blocks.0.mlp.w3.weight", 2)[1]  # int(2/3 int(hidden ratio)): rounded down twice
    candidates = [4.0, *((math.ceil(1.5 * inner) + extra) / hidden for extra in range(3))]
    for ratio in candidates:
        if int(2 / 3 * int(hidden * ratio)) == inner:
            return ratio
    raise CheckpointError(
        f"The feed-forward layers have {inner} units for a hidden size of {hidden}: not a LightningDiT."
    )


def _heads(weights: Mapping[str, Tensor], hidden: int) -> int:
    if "blocks.0.attn.q_norm.weight" in weights:
        return hidden // weights["blocks.0.attn.q_norm.weight"].shape[0]
    if "feat_rope.freqs_cos" in weights:
        return hidden // weights["feat_rope.freqs_cos"].shape[1]
    if hidden not in _HEADS:
        raise CheckpointError(
            f"Nothing in these weights tells their number of attention heads (hidden size {hidden}): add num_heads=N."
        )
    return _HEADS[hidden]


def _classes(weights: Mapping[str, Tensor], num_classes: int | None) -> dict[str, Any]:
    table = weights.get("y_embedder.embedding_table.weight")
    rows = 0 if table is None else table.shape[0]
    if num_classes is None:
        num_classes = max(0, rows - 1)
    if rows - num_classes not in (0, 1):
        raise CheckpointError(
            f"num_classes={num_classes} does not fit a label table of {rows} rows: "
            f"use num_classes={max(0, rows - 1)} (the last row is the null class) or num_classes={rows}."
        )
    return {"num_classes": num_classes, "class_dropout_prob": 0.1 if rows > num_classes else 0.0}
