"""Where classes lie that lay elsewhere once: checkpoints, records and plugin packages name them as of then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

_PLUGINS = "flowanchor.plugins"

# A module, or a class of one, as version 0.1 had it, and as it is.
MOVED = {
    "flowanchor.sampling.ConsistencySampler": f"{_PLUGINS}.samplers.consistency.ConsistencySampler",
    "flowanchor.sampling.FlowSampler": f"{_PLUGINS}.samplers.flow.FlowSampler",
    "flowanchor.sampling.MeanFlowSampler": f"{_PLUGINS}.samplers.meanflow.MeanFlowSampler",
    **{f"flowanchor.sampling.{name}": f"{_PLUGINS}.samplers.{name}" for name in ("consistency", "flow", "meanflow")},
    **{f"flowanchor.codecs.{name}": f"{_PLUGINS}.codecs.{name}" for name in ("identity", "kl", "wan_vae")},
    **{f"flowanchor.text.{name}": f"{_PLUGINS}.text_encoders.{name}" for name in ("minilm", "umt5")},
    **{
        f"flowanchor.metrics.{name}": f"{_PLUGINS}.metrics.{name}"
        for name in ("small", "random_features", "inception", "t2i")
    },
    **{
        f"flowanchor.data.{name}": f"{_PLUGINS}.data.{name}"
        for name in ("digits", "cifar10", "fashion_mnist", "image_folder", "latents", "webdataset", "captioned")
    },
}


def current_name(target: str) -> str:
    """The name of a class today."""
    parts = target.split(".")
    for length in range(len(parts), 1, -1):
        found = MOVED.get(".".join(parts[:length]))
        if found is not None:
            return ".".join([found, *parts[length:]])
    return target


def use_current_names(cfg: DictConfig) -> None:
    """Put today's names in the place of every `_target_` of a configuration, in place."""
    for key, target in list(_targets(OmegaConf.to_container(cfg, resolve=False))):
        if current_name(target) != target:
            OmegaConf.update(cfg, key, current_name(target))


def _targets(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            where = f"{key}.{name}" if key else str(name)
            if name == "_target_" and isinstance(inner, str):
                yield where, inner
            else:
                yield from _targets(inner, where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _targets(inner, f"{key}[{index}]")
