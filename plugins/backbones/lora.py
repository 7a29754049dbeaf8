"""Low-rank adapters (LoRA, arXiv 2106.09685) in a backbone, by `peft`: a few trained weights beside frozen ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flowanchor.errors import ConfigError

ADAPTER = "default"  # peft's name of an only adapter
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def add_adapters(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Give the linear layers of `settings["targets"]` an adapter and freeze everything else.

    The frozen weights keep their names in the state dict, as if there were no adapters.

    Args:
        settings: `rank`; `alpha`, the adapters' factor times the rank (null: the rank, a factor of 1); `targets`, ends
            of the layers' names (null: attention and feed-forward).

    Raises `ConfigError` for a rank below 1, for layers that do not exist, and where peft is not installed.
    """
    rank, alpha, targets = settings["rank"], settings.get("alpha"), list(settings.get("targets") or TARGETS)
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"backbone.lora.rank={rank} is no rank: use for example 16, or null for no adapters.")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("backbone.lora needs peft: pip install 'flowanchor[wan]'.") from error
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets), network)
    except ValueError as error:
        raise ConfigError(f"backbone.lora.targets={targets} names no layer of this network ({error}).") from error
    network._register_state_dict_hook(_leave_out_base)
    network.register_load_state_dict_pre_hook(_put_in_base)


def is_adapter(name: str) -> bool:
    """Whether a name in a state dict is an adapter's."""
    return ".lora_" in name


def initialise_adapter(layer: Any) -> None:
    """As published: `A` random, `B` zero, so that training starts from the frozen network."""
    nn.init.kaiming_uniform_(layer.lora_A[ADAPTER].weight, a=math.sqrt(5))
    nn.init.zeros_(layer.lora_B[ADAPTER].weight)


def merged(network: nn.Module) -> dict[str, Tensor]:
    """The state dict with every adapter added to the weight that it stands beside."""
    state = {name: tensor for name, tensor in network.state_dict().items() if not is_adapter(name)}
    for name, layer in network.named_modules():
        if hasattr(layer, "get_delta_weight"):
            key = f"{name}.weight"
            state[key] = state[key] + layer.get_delta_weight(ADAPTER).detach()
    return state


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and ".base_layer." in name]:
        state[name.replace(".base_layer.", ".")] = state.pop(name)


def _put_in_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A"):
            for end in ("weight", "bias"):
                if f"{prefix}{name}.{end}" in state:
                    state[f"{prefix}{name}.base_layer.{end}"] = state.pop(f"{prefix}{name}.{end}")
