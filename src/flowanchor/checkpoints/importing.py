"""From a released file to a checkpoint of ours: its weights, and the configuration that the file does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowanchor.base.plain import plain
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.checkpoints.foreign import ForeignFile
from flowanchor.checkpoints.infer import CLASSES, Fit, compare, infer_backbone
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import CheckpointError

KINDS = ("flow", "shortcut")
_INTERVALS = "flowanchor.plugins.objectives.intervals"
INTERVALS = {
    "plain": f"{_INTERVALS}.plain.PlainInterval",
    "expanded": f"{_INTERVALS}.expanded.ExpandedInterval",
    "auxiliary": f"{_INTERVALS}.auxiliary.AuxiliaryInterval",
}
_SAMPLERS: dict[str, dict[str, Any]] = {
    "flow": {"_target_": "flowanchor.sampling.FlowSampler", "steps": 50, "solver": "euler"},
    "shortcut": {"_target_": "flowanchor.sampling.ConsistencySampler", "steps": 2, "grid": None},
}
_KL = {"_target_": "flowanchor.codecs.kl.KLCodec", "weights": None, "dtype": "float32", "chunk": 32}
_IDENTITY = {"_target_": "flowanchor.codecs.identity.Identity"}
# By channels of a sample; VA-VAE's latents are normalised with statistics of the data, which no release holds.
_CODECS: dict[int, dict[str, Any]] = {
    1: _IDENTITY,
    3: _IDENTITY,
    4: {**_KL, "name": "sd_vae", "latent_channels": 4, "downsampling": 8, "statistics": None},
    32: {**_KL, "name": "vavae", "latent_channels": 32, "downsampling": 16, "statistics": None},
}
_SD_SCALE = {"mean": [], "std": [], "multiplier": 0.18215}  # of SiT's and DiT's latents


@dataclass(frozen=True)
class Choices:
    """What a released file does not tell; None: inferred, or asked for where that is impossible."""

    ema: str | None = None
    backbone: str | None = None
    kind: str | None = None
    interval: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    codec: Mapping[str, Any] | None = None  # the entry of a configuration


@dataclass(frozen=True)
class Imported:
    """Weights with what is needed to open them alone; in the form that `write_consolidated` takes."""

    weights: Mapping[str, Tensor]
    meta: dict[str, Any]  # format, kind, step, config
    ema: str
    fit: Fit


def import_foreign(file: ForeignFile, choices: Choices) -> Imported:
    """A released file as a checkpoint of ours; raises `CheckpointError` where it does not fit a network exactly."""
    ema, weights = file.weights(choices.ema)
    exported = plain((file.export or {}).get("config"), f"{file.path}: its description")
    exported = exported if isinstance(exported, dict) and isinstance(exported.get("backbone"), dict) else None
    if exported is not None and choices.backbone is None:
        backbone = exported["backbone"]
    else:
        backbone = _inferred(file, weights, choices)
    fit = compare(weights, backbone, file.path)
    if not fit.complete:
        raise CheckpointError(f"{file.path} ({ema}) {describe_misfit(fit)}: see python src/convert.py inspect=FILE.")
    kind = _kind(file, backbone, choices)
    interval = choices.interval or _interval(kind, backbone)
    if interval not in INTERVALS:
        raise CheckpointError(f"interval={interval} is not known: use one of {', '.join(INTERVALS)}.")
    if exported is not None:
        config = dict(exported)
        if choices.interval:
            config["objective"] = {"interval": {"_target_": INTERVALS[interval]}}
        if kind != (file.export or {}).get("kind"):
            config["sampler"] = _SAMPLERS[kind]
        if choices.codec is not None:
            config["codec"] = _codec(backbone["in_channels"], choices.codec)
    else:
        config = {
            "backbone": backbone,
            "objective": {"interval": {"_target_": INTERVALS[interval]}},
            "sampler": _SAMPLERS[kind],
            "data": {
                "channels": backbone["in_channels"],
                "size": backbone["input_size"],
                "num_classes": backbone["num_classes"],
            },
            "codec": _codec(backbone["in_channels"], choices.codec),
        }
    return Imported(weights, {"format": FORMAT, "kind": kind, "step": file.step, "config": config}, ema, fit)


def describe_misfit(fit: Fit) -> str:
    """In words, the first few of each kind."""
    found = (("lacks", fit.missing), ("has the unknown", fit.unknown), ("has another shape of", fit.reshaped))
    return ", ".join(
        f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in found
        if keys
    )


def _inferred(file: ForeignFile, weights: Mapping[str, Tensor], choices: Choices) -> dict[str, Any]:
    try:
        return infer_backbone(weights, choices.backbone, choices.num_heads, choices.num_classes)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def _kind(file: ForeignFile, backbone: Mapping[str, Any], choices: Choices) -> str:
    if choices.kind is not None and choices.kind not in KINDS:
        raise CheckpointError(f"kind={choices.kind} is not known: use kind=flow or kind=shortcut.")
    if choices.kind is not None:
        return choices.kind
    if file.objective in KINDS:
        return str(file.objective)
    if backbone["_target_"].endswith((CLASSES["sit"], CLASSES["dit"])):
        return "flow"
    raise CheckpointError(
        f"Nothing in {file.path} tells what it was trained for: add kind=flow (LightningDiT, stage 1 of FACM) or "
        "kind=shortcut (stage 2)."
    )


def _interval(kind: str, backbone: Mapping[str, Any]) -> str:
    """Stage 1 of FACM knows both halves of the time interval, so `plain` is right for every flow model."""
    if kind == "flow":
        return "plain"
    return "auxiliary" if backbone.get("auxiliary_time_cond") else "expanded"


def _codec(channels: int, chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entry of the configuration, its statistics as numbers."""
    found = chosen if chosen is not None else _CODECS.get(channels)
    if found is None:
        raise CheckpointError(
            f"Samples of {channels} channels do not tell their codec: add codec=vavae, codec=sd_vae or codec=identity."
        )
    codec = dict(found)
    if codec.get("latent_channels", channels) != channels:
        raise CheckpointError(
            f"codec={codec.get('name')} has latents of {codec['latent_channels']} channels and the network draws "
            f"{channels}: choose another codec, or add codec.latent_channels={channels}."
        )
    if codec.get("statistics") is not None:
        statistics = LatentStatistics.read(codec["statistics"])
        statistics.check(channels, "codec.statistics")
        codec["statistics"] = statistics.as_config()
    elif codec.get("name") == "sd_vae":
        codec["statistics"] = _SD_SCALE
    return codec
