"""LoRA files of other programs, read by diffusers' own loaders: which weights they add to, and with which scale."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from diffusers import loaders
from torch import Tensor

from flowanchor.base.plain import bare
from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.errors import ConfigError
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline

PART = "transformer."
TEXTS = "text_encoder"  # of whichever number
REFUSED = ("use_dora", "use_rslora", "lora_bias")  # of peft's settings: other formulas


def factors(
    pipeline: Pipeline, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: object
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of a weight -> A [r, *], B [out, r] with `alpha / rank` in it.

    Alpha is what the file says, wherever it does: beside the tensors, as kohya and ComfyUI have it, or in peft's
    settings in the metadata; without one the scale is 1. Raises `ConfigError` for what is no plain LoRA of a
    transformer, and for names that the loader does not know.
    """
    loader: Any = getattr(loaders, pipeline.loader)
    if any("dora_scale" in name for name in tensors):
        raise ConfigError(f"base_lora={source} is a DoRA, which adds no product to the weights: merge it elsewhere.")
    alphas = {name.removesuffix(".alpha"): float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    plain = any(name.startswith(PART) for name in tensors)
    given = {name: value for name, value in tensors.items() if not (plain and name.endswith(".alpha"))}
    try:
        found, *rest = loader.lora_state_dict(dict(given), return_lora_metadata=True)
    except Exception as error:  # converters raise whatever meets a name that they do not know
        raise ConfigError(f"base_lora={source} is not read by {pipeline.loader} of diffusers ({error}).") from error
    foreign = [name for name in found if not name.startswith((PART, TEXTS))]
    if foreign:
        raise ConfigError(
            f"base_lora={source} is not read by {pipeline.loader} of diffusers, which knows no {bare(foreign[0])}: "
            "give a LoRA of the same class of networks."
        )
    if any(name.startswith(TEXTS) for name in found):
        rank_zero_warn(f"base_lora={source} has adapters of a text encoder too, which are left out.")
    # A converter multiplies alphas into the weights, or sets them apart, or leaves them where they are.
    apart = dict(rest[0] or {}) if len(rest) > 1 else {}
    left = {name: float(value) for name, value in {**found, **apart}.items() if name.endswith(".alpha")}
    said = (alphas if plain else {}) | {name.removesuffix(".alpha"): value for name, value in left.items()}
    config = _settings(metadata, source)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name, a in found.items():
        if not name.startswith(PART) or not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        b, own, rank = found.get(f"{layer}.lora_B.weight"), layer.removeprefix(PART), a.shape[0]
        if b is None or b.shape[1] != rank:
            raise ConfigError(f"base_lora={source} holds no whole product beside {bare(own)}: download it again.")
        alpha = said.pop(layer, None)
        if alpha is None and config:
            alpha = _of(config.get("alpha_pattern") or {}, own, config.get("lora_alpha", rank))
        scale = 1.0 if alpha is None else float(alpha) / rank
        if not math.isfinite(scale):
            raise ConfigError(f"base_lora={source} has no scale beside {bare(own)}: its alpha is {alpha}.")
        made[f"{own}.weight"] = a, scale * b
    known = {f"{PART}{name.removesuffix('.weight')}.lora_{part}.weight" for name in made for part in "AB"}
    odd = [name for name in found if name.startswith(PART) and name not in known and not name.endswith(".alpha")]
    odd += [f"{name}.alpha" for name in said if name.startswith(PART)]
    if odd:
        raise ConfigError(f"base_lora={source} holds more than products of two matrices ({bare(odd[0])}).")
    return made


def _settings(metadata: Mapping[str, str], source: object) -> dict[str, Any]:
    """Peft's settings of the transformer, as diffusers writes them; empty where there are none."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        found = {key.removeprefix(PART): value for key, value in content.items() if key.startswith(PART)}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"base_lora={source} has damaged metadata (lora_adapter_metadata).") from error
    odd = [name for name in REFUSED if found.get(name)]
    if odd:
        raise ConfigError(f"base_lora={source} is trained with {odd[0]}, which is no plain LoRA: merge it elsewhere.")
    return found


def _of(pattern: Mapping[str, Any], layer: str, usual: Any) -> Any:
    """The entry of a layer, by the end of its name, as peft looks it up."""
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({re.escape(key.lstrip('^'))})$", layer))
    return next(found, usual)
