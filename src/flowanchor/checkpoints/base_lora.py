"""A LoRA of the user's own, merged into the weights that a run starts from (`base_lora=FILE`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.plain import bare
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Backbone
from flowanchor.weights import View, checked_weights, copy_weights, local, own_part, shape_of

SETTING, SCALE = "base_lora", "base_lora_scale"


def with_base_lora(
    backbone: Backbone, weights: Mapping[str, Tensor], config: Mapping[str, Any], path: str | Path | None = None
) -> Mapping[str, Tensor]:
    """The weights with what a run's `base_lora` adds to them; as they are where it has none.

    `path`: where that file lies, if not where the run says.
    """
    named = path or config.get(SETTING)
    if not named:
        return weights
    file = find_checkpoint(named)
    try:
        with safe_open(file, framework="pt") as content:
            found = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no dictionary
            metadata = dict(content.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{SETTING}={file} cannot be read ({error}): give a .safetensors file.") from error
    factors = backbone.lora_factors(checked_weights(found, file), metadata, file)
    lacking = [name for name in factors if name not in weights]
    if lacking or not factors:
        raise ConfigError(
            f"{SETTING}={file} has adapters beside {bare(lacking[0])}, which this network does not have: give a LoRA "
            "of the same class of networks."
            if lacking
            else f"{SETTING}={file} has no adapters of a transformer: give a LoRA of the same class of networks."
        )
    for name, (a, b) in factors.items():
        shape = shape_of(weights, name)
        if (b.shape[0], a[0].numel()) != (shape[0], shape[1:].numel()):
            raise ConfigError(
                f"{SETTING}={file} has another size beside {bare(name)}: give a LoRA of a network of this size."
            )
    scale = float(config.get(SCALE, 1.0))
    return Added(weights, {name: (a, scale * b) for name, (a, b) in factors.items()})


class Added(View):
    """The entries of other weights, to some of which a product `B A` is added: name -> A [r, *], B [out, r]."""

    def __init__(self, weights: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.weights, self.factors = weights, dict(factors)

    def _find(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        return self.weights, name

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __getitem__(self, name: str) -> Tensor:
        value = self.weights[name]
        if name not in self.factors:
            return value
        a, b = (part.float().flatten(1) for part in self.factors[name])
        return (value.float() + (b @ a).view(value.shape)).to(value.dtype)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        copy_weights(self.weights, {name: tensor for name, tensor in targets.items() if name not in self.factors})
        for name, tensor in targets.items():
            if name in self.factors:
                local(tensor).copy_(self[name][own_part(tensor)])
