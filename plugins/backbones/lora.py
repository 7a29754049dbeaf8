"""Low-rank adapters (LoRA, arXiv 2106.09685) in a backbone, by `peft`: a few trained weights beside frozen ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flowanchor.errors import ConfigError

ADAPTER = "default"  # peft's name of an only adapter
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def add_adapters(
    network: nn.Module,
    settings: Mapping[str, Any],
    usual: Sequence[str] = TARGETS,
    blocks: Mapping[str, nn.Module] | None = None,
) -> None:
    """Give the linear layers of `settings["targets"]` an adapter and freeze everything else.

    The frozen weights keep their names in the state dict, as if there were no adapters.

    Args:
        settings: `rank`; `alpha`, the adapters' factor times the rank (null: the rank, a factor of 1); `targets`, ends
            of the layers' names (null: the usual ones, attention and feed-forward).
        usual: those.
        blocks: by name, the modules in which such ends are looked for; a layer elsewhere is named whole. None: in the
            whole network.

    Raises `ConfigError` for a rank below 1, for layers that do not exist, and where peft is not installed.
    """
    rank, alpha, targets = settings["rank"], settings.get("alpha"), list(settings.get("targets") or usual)
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"backbone.lora.rank={rank} is no rank: use for example 16, or null for no adapters.")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("backbone.lora needs peft: pip install 'flowanchor[wan]'.") from error
    wanted: list[str] | str = targets
    if blocks is not None:
        wanted = _exactly(_named(network, blocks, targets, all_of=bool(settings.get("targets"))))
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=wanted), network)
    except ValueError as error:
        raise ConfigError(f"backbone.lora.targets={targets} names no layer of this network ({error}).") from error
    network._register_state_dict_hook(_leave_out_base)
    network.register_load_state_dict_pre_hook(_put_in_base)


def _named(
    network: nn.Module, blocks: Mapping[str, nn.Module], targets: Sequence[str], all_of: bool
) -> dict[str, list[str]]:
    """The layers that each target names, by their whole names; raises `ConfigError` where (one of them) names none."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    inside = [f"{block}.{name}" for block, module in blocks.items() for name, _ in module.named_modules() if name]
    layers = {name for name, layer in network.named_modules() if isinstance(layer, kinds)}
    found = {one: [name for name in inside if name in layers and f".{name}".endswith(f".{one}")] for one in targets}
    found = {one: names or [one] * (one in layers) for one, names in found.items()}
    lacking = [one for one, names in found.items() if not names]
    if lacking and (all_of or len(lacking) == len(found)):
        known = sorted({name.split(".", 2)[-1] for name in inside if name in layers})
        raise ConfigError(
            f"backbone.lora.targets names no layer of this network by {', '.join(lacking)}: its blocks have "
            f"{', '.join(known)}."
        )
    return found


def _exactly(found: Mapping[str, Sequence[str]]) -> str:
    """A pattern for these names and no others, as peft takes it."""
    return "|".join(re.escape(name) for names in found.values() for name in names)


def is_adapter(name: str) -> bool:
    """Whether a name in a state dict is an adapter's."""
    return ".lora_" in name


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """The layers in a module that have an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if "lora_A" in layer._modules}


def stage_adapters(stages: Sequence[Sequence[nn.Module]]) -> list[tuple[Any, ...]]:
    """Of each stage's modules, the layers that have an adapter."""
    return [tuple(layer for module in stage for layer in adapted_layers(module).values()) for stage in stages]


def adapter_parts(module: nn.Module) -> set[nn.Module]:
    """The modules in a module that belong to adapters."""
    return {part for name, part in module.named_modules() if is_adapter(f".{name}")}


def switch(layers: Sequence[Any], on: bool) -> None:
    """Put the adapters of these layers on, or off; whoever runs the layers next says it again.

    Not by peft's own methods, which also say what is trained: a backward pass that is to come would find nothing. Nor
    by a region that puts everything back, which a compiled block cannot be interrupted in.
    """
    for layer in layers:
        if layer._disable_adapters == on:
            layer._disable_adapters = not on


def initialise_adapter(layer: Any) -> None:
    """As published: `A` random, `B` zero, so that training starts from the frozen network."""
    nn.init.kaiming_uniform_(layer.lora_A[ADAPTER].weight, a=math.sqrt(5))
    nn.init.zeros_(layer.lora_B[ADAPTER].weight)


def merged(network: nn.Module) -> dict[str, Tensor]:
    """The state dict with every adapter added to the weight that it stands beside."""
    state = {name: tensor for name, tensor in network.state_dict().items() if not is_adapter(name)}
    for name, layer in adapted_layers(network).items():
        key = f"{name}.weight"
        state[key] = state[key] + layer.get_delta_weight(ADAPTER).detach()
    return state


def merge(network: nn.Module) -> None:
    """Add every adapter to the weight that it stands beside, for good; the layers are plain ones again."""
    for name, layer in adapted_layers(network).items():
        parent, _, own = name.rpartition(".")
        layer.merge()
        setattr(network.get_submodule(parent), own, layer.get_base_layer())


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and ".base_layer." in name]:
        state[name.replace(".base_layer.", ".")] = state.pop(name)


def _put_in_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in adapted_layers(module):
        for end in ("weight", "bias"):
            if f"{prefix}{name}.{end}" in state:
                state[f"{prefix}{name}.base_layer.{end}"] = state.pop(f"{prefix}{name}.{end}")
