"""From a checkpoint or a run folder to a network that can teach, start a student, or be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flowanchor.base.trusted import build, check
from flowanchor.checkpoints.adapters import outlined
from flowanchor.checkpoints.base_lora import with_base_lora
from flowanchor.checkpoints.description import described_network, named_classes
from flowanchor.checkpoints.digest import file_digest
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.fit import check_fit
from flowanchor.checkpoints.format import DescribedWeights
from flowanchor.checkpoints.read import read_checkpoint, select_weights, weights_at
from flowanchor.deferred import is_deferred, loading_context, materialise, parameters_on_meta
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval
from flowanchor.weights import Copied, check_finite, copy_weights


@dataclass(frozen=True)
class LoadedModel:
    """A trained network and what is known about it."""

    backbone: Backbone  # evaluation mode
    interval: Interval
    kind: str  # "shortcut" or "flow": what it was trained for
    config: dict[str, Any]  # resolved config of the training run
    ema: str  # which weights: the profile's name, or "none" for the raw ones
    digest: str  # first 12 hex digits of the file's sha256
    path: str
    step: int
    sources: dict[str, str] = field(default_factory=dict)  # the sha256 of what lies elsewhere: adapters' base
    class_names: tuple[str, ...] = ()  # one for each class, where the data had names and the checkpoint keeps them

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.backbone.parameters()).device

    def record(self) -> dict[str, Any]:
        """Which weights these are, for a record of what was done with them."""
        place = str(Path(self.path).resolve())
        return {"checkpoint": place, "hash": self.digest, "step": self.step, "ema": self.ema, "sources": self.sources}


def load_model(
    path: str | Path,
    ema: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    initialise_from: str | Path | Mapping[str, str] | None = None,
    hashed: bool = True,
    network: Backbone | None = None,
    base_lora: str | Path | None = None,
) -> LoadedModel:
    """Load the network of a run.

    Args:
        path: a .ckpt file, a sharded checkpoint, a .safetensors file of `convert.py consolidate`, a run folder (its
            `checkpoints/last.ckpt`), or what a format opens where it lies (`Format.in_place`).
        ema: name of an EMA profile; None for the run's default one (raw weights where it kept none); "none" for the raw
            weights; "posthoc:0.15" for an average of that relative width, synthesised from the run's snapshots.
        device: where the network goes. Within `defer_loading` it goes nowhere: its weights stay in the file until
            `materialise` asks for them.
        dtype: bfloat16 or float16, for sampling: so the weights of linear layers and convolutions are stored, read
            straight to the device; what the network wants in float32 stays there. None: float32.
        initialise_from: where the weights lie that adapters stand beside, if not where the run found them.
        hashed: False leaves `digest` empty: the file is not read for it.
        network: one of the user's own that takes the weights, in place of what the file describes.
        base_lora: where the LoRA lies that was merged into those weights, if not where the run found it.
    """
    file = find_checkpoint(path)
    content = read_checkpoint(file)
    meta = content["flowanchor"]
    config = meta["config"]
    described, interval = described_network(config, file)
    if network is None:
        check(described, "backbone", file)
    check(interval, "objective.interval", file)
    name, weights = select_weights(content, ema, file)
    sources: dict[str, str] = {}
    if network is not None:
        backbone = network
    else:
        shapes, weights, sources = outlined(meta, weights, file, initialise_from, base_lora)
        check_fit(shapes, weights, file)
        with loading_context() if dtype is None else parameters_on_meta():
            backbone = cast(Backbone, build(described, "backbone", file))
    load_weights(backbone, weights, file)
    if dtype is not None:
        store_low(backbone, dtype)
        materialise(backbone, torch.device(device))
        check_finite(dict(backbone.named_parameters()), file)
    return LoadedModel(
        backbone=backbone.eval() if is_deferred(backbone) else backbone.eval().to(device),
        interval=cast(Interval, build(interval, "objective.interval", file)),
        kind=meta["kind"],
        config=config,
        ema=name,
        digest=file_digest(file)[:12] if hashed else "",
        path=str(file),
        step=meta["step"],
        sources=sources,
        class_names=tuple(named_classes(meta.get("class_names", []), backbone.conditioning.classes)),
    )


def open_described(given: DescribedWeights) -> tuple[Backbone, Interval]:
    """The network of described weights, in evaluation mode, and its interval."""
    network, interval = described_network(given.meta["config"], given.file)
    backbone = cast(Backbone, build(network, "backbone", given.file))
    load_weights(backbone, given.weights, given.file)
    return backbone.eval(), cast(Interval, build(interval, "objective.interval", given.file))


def store_low(backbone: Backbone, dtype: torch.dtype, frozen: bool = False) -> None:
    """Give linear layers and convolutions outside `float32_modules` parameters of a lower precision, in place.

    These are what autocast would cast at every call: under it the network answers the same, bit for bit. `frozen`: only
    those of which nothing is trained.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype} is no lower precision: use bfloat16 or float16, or none for float32.")
    kept = {inner for module in backbone.float32_modules() for inner in module.modules()}
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, _ConvNd)) and module not in kept:
            own = list(module.parameters(recurse=False))
            if frozen and any(parameter.requires_grad for parameter in own):
                continue
            for parameter in own:
                parameter.data = parameter.data.to(dtype)


def load_weights(
    backbone: Backbone, weights: Mapping[str, Tensor], source: str | Path, optional: tuple[str, ...] = ()
) -> None:
    """Copy weights into a network, strictly except for missing keys that start with one of `optional`.

    A network without values (`parameters_on_meta`) is told where its weights are; `materialise` fetches them.
    """
    check_fit(backbone, weights, source, optional)
    if is_deferred(backbone):
        backbone.pending = weights
    else:
        ours = backbone.state_dict()
        copy_weights(weights, {key: tensor for key, tensor in ours.items() if key in weights})
        parameters = dict(backbone.named_parameters())
        check_finite(parameters, source, (name for name in parameters if name in weights))


def initialise_student(
    backbone: Backbone,
    path: str | Path | Mapping[str, str],
    ema: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Start a student from the (EMA) weights of an earlier run; embedders of r and guidance that it lacks stay zero, or
    take the values of which the student says that they are a copy (`StagedWeights.copies`).

    `path`: a checkpoint, or one for each part of a network of parts (`{high: PATH, low: PATH}` for two experts).
    `config`: of the run, which may merge a LoRA into them (`base_lora`).
    """
    weights, source = weights_at(path, ema, backbone)
    weights = with_base_lora(backbone, weights, config or {})
    copies = backbone.copies()
    load_weights(backbone, Copied(weights, copies) if copies else weights, source, _may_lack(backbone))


def _may_lack(backbone: Backbone) -> tuple[str, ...]:
    """Names that weights to start from need not have: of embedders that begin at zero, of adapters, of what only
    training asks."""
    names, borrowed = list(backbone.state_dict()), backbone.borrowed()
    embedder = [name for name in names if backbone.takes_end_time and "r_embedder." in name]
    embedder += [name for name in names if backbone.takes_guidance and name.startswith("guidance_embedder.")]
    embedder += backbone.without_training_parts()[0]
    return (*embedder, *(name for name in names if borrowed and name not in borrowed))
