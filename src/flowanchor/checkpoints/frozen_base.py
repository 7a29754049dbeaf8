"""How the frozen weights that adapters stand beside are kept in training: in fewer bits (`base_dtype=`)."""

from __future__ import annotations

import torch
from torch import nn

from flowanchor.checkpoints.load import store_low
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone

BASES = ("float32", "bfloat16", "int8", "float8")
_REFUSED = {
    "bnb8": "bitsandbytes' 8 bits have no forward-mode derivative",
    "int4": "a base in 4 bits is not offered",
    "nf4": "a base in 4 bits is not offered",
}


def keep_base(student: Backbone, dtype: str, low_precision: bool, sharded: bool = False) -> None:
    """Keep what a student borrows (`Backbone.borrowed`) in fewer bits, in place; what is trained stays as it is.

    `bfloat16`: linear layers and convolutions, whose weights autocast would cast at every call: the same answers, bit
    for bit. `int8`, `float8`: the weights of the blocks' linear layers alone, a scale per row (torchao, weight-only:
    each product is one of plain numbers, so that tangents and gradients are those of the rounded weights); the others
    as under `bfloat16`, where training casts.

    Args:
        low_precision: whether training casts to bfloat16 (`trainer.precision=bf16-mixed`).
        sharded: whether the strategy spreads weights over processes.

    Raises `ConfigError` for what cannot be: a network that borrows nothing, bfloat16 in a run that does not cast,
    a sharded network, torchao that is not installed.
    """
    if dtype not in BASES:
        reason = f" ({_REFUSED[dtype]})" if dtype in _REFUSED else ""
        raise ConfigError(f"base_dtype={dtype} is unknown{reason}: choose {', '.join(BASES)}.")
    if dtype == "float32":
        return
    if not student.borrowed():
        raise ConfigError(
            f"base_dtype={dtype} is for the frozen weights that adapters stand beside, and this network trains all of "
            "its own: leave it out, or train adapters (backbone.lora.rank=64)."
        )
    if dtype == "bfloat16" and not low_precision:
        raise ConfigError(
            "base_dtype=bfloat16 needs a run that casts to it: set trainer.precision=bf16-mixed, or leave it out."
        )
    if sharded:
        raise ConfigError(
            f"base_dtype={dtype} is not for a sharded network, whose frozen weights are spread over the devices: leave "
            "it out, or use strategy=ddp with the whole network on each device."
        )
    if low_precision:
        store_low(student, torch.bfloat16, frozen=True)
    if dtype in ("int8", "float8"):
        _quantise(student, dtype)


def _quantise(student: Backbone, dtype: str) -> None:
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # optional, heavy
    except ImportError as error:
        raise ConfigError(f"base_dtype={dtype} needs torchao: pip install 'flowanchor[quantise]'.") from error
    how = Int8WeightOnlyConfig if dtype == "int8" else Float8WeightOnlyConfig
    blocks = nn.ModuleList(module for stage in student.stage_modules()[1:-1] for module in stage)
    quantize_(blocks, how(set_inductor_config=False), lambda layer, name: _is_frozen_linear(layer))


def _is_frozen_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters(recurse=False))
