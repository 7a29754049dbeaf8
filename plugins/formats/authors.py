"""The layout of the authors of FACM, and of LightningDiT, SiT and DiT: every variant is read, that of FACM written.

Their evaluation reads `ema` where a file has no `emas`; their training starts a student from `ema`, and takes the
teacher from there, where a file has no `step`. Both ask `load_state_dict` with `strict=False`, which would not notice
missing names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.base.files import replacing, save_torch
from flowanchor.base.plain import plain
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.checkpoints.description import KINDS
from flowanchor.checkpoints.fit import compare
from flowanchor.checkpoints.format import Choices, DescribedWeights, Format
from flowanchor.checkpoints.summary import count, fit_lines, listed, network_lines
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import CheckpointError, FlowAnchorError
from flowanchor.plugins.formats.authors_file import EXPORT, ForeignFile, read_foreign
from flowanchor.plugins.formats.authors_sizes import CLASSES, infer_backbone

_INTERVALS = "flowanchor.plugins.objectives.intervals"
INTERVALS = {
    "plain": f"{_INTERVALS}.plain.PlainInterval",
    "expanded": f"{_INTERVALS}.expanded.ExpandedInterval",
    "auxiliary": f"{_INTERVALS}.auxiliary.AuxiliaryInterval",
}
_SAMPLERS: dict[str, dict[str, Any]] = {
    "flow": {"_target_": "flowanchor.plugins.samplers.flow.FlowSampler", "steps": 50, "solver": "euler"},
    "shortcut": {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2, "grid": None},
}
_KL = {"_target_": "flowanchor.plugins.codecs.kl.KLCodec", "weights": None, "dtype": "float32", "chunk": 32}
_IDENTITY = {"_target_": "flowanchor.plugins.codecs.identity.Identity"}
# By channels of a sample; VA-VAE's latents are normalised with statistics of the data, which no release holds.
_CODECS: dict[int, dict[str, Any]] = {
    1: _IDENTITY,
    3: _IDENTITY,
    4: {**_KL, "name": "sd_vae", "latent_channels": 4, "downsampling": 8, "statistics": None},
    32: {**_KL, "name": "vavae", "latent_channels": 32, "downsampling": 16, "statistics": None},
}
_SD_SCALE = {"mean": [], "std": [], "multiplier": 0.18215}  # of SiT's and DiT's latents


class Authors(Format):
    """`.pt` files of FACM, LightningDiT, SiT and DiT.

    Whatever else is a file is read here, too, and its reader says what is missing. Weights of one average are written
    as `ema`, and the raw ones, where they are known, as `model`; a further entry of plain values keeps what the layout
    has no place for (kind, step, configuration), so that reading the file back loses nothing.
    """

    name = "authors"
    suffix = ".pt"
    broad = True

    def recognises(self, path: Path) -> bool:
        return path.is_file()

    def read(self, path: Path, choices: Choices) -> DescribedWeights:
        return _described(read_foreign(path), choices)

    def inspect(self, path: Path, choices: Choices) -> Iterator[str]:
        file = read_foreign(path)
        yield f"{file.path}: {file.kind}"
        trained = f"{file.objective or 'not told: kind=flow or kind=shortcut'}, step {file.step or 'not told'}"
        yield f"  trained as   {trained}"
        for name, weights in file.profiles.items():
            yield f"  weights      {name}: {count(weights)}{' (the default)' if name == file.default else ''}"
        if file.others:
            yield f"  also holds   {', '.join(file.others)}"
        yield from listed("of no profile", file.ignored)
        _, weights = file.weights(choices.ema)
        if any(key.startswith("decoder.") for key in weights):
            yield f"  backbone     none: these are the weights of an autoencoder, for codec.weights={file.path}"
            return
        try:
            backbone = infer_backbone(weights, choices.backbone, choices.num_heads, choices.num_classes)
        except CheckpointError as error:
            yield f"  backbone     {error}"
            return
        yield from network_lines(backbone)
        try:
            yield from fit_lines(compare(weights, backbone, file.path))
        except FlowAnchorError as error:
            yield f"  no match     {error}"
            return
        yield from _import_line(file, choices)

    def write(self, given: DescribedWeights, output: Path) -> str:
        """Raises `CheckpointError` for a network that theirs is not."""
        target, meta = given.meta["config"]["backbone"].get("_target_"), given.meta
        if ".lightningdit." not in str(target):
            raise CheckpointError(
                f"The authors' code knows LightningDiT alone, and this is a {target}: "
                "use format=flowanchor or format=huggingface."
            )
        end_time = given.meta["config"]["backbone"].get("end_time")
        if end_time in ("decoupled", "gated"):
            raise CheckpointError(
                f"The authors' code knows no {end_time} end time (backbone.end_time): use format=flowanchor or "
                "format=huggingface."
            )
        scale = given.meta["config"]["backbone"].get("time_scale", 1)
        if scale != 1:
            raise CheckpointError(
                f"The authors' code feeds its network the time as it is, and this one {scale:g} times it "
                "(backbone.time_scale): use format=flowanchor or format=huggingface."
            )
        content: dict[str, Any] = {"ema": _whole(given.weights)}
        if given.raw is not None and given.ema != "none":
            content["model"] = _whole(given.raw)
        content[EXPORT] = {"kind": meta["kind"], "step": int(meta["step"]), "ema": given.ema, "config": meta["config"]}
        with replacing(output) as draft:
            save_torch(draft, content)
        return count(given.weights)


def _described(file: ForeignFile, choices: Choices) -> DescribedWeights:
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
        raise CheckpointError(f"{file.path} ({ema}) {fit.misfit()}: see python src/convert.py inspect=FILE.")
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
    meta = {"format": FORMAT, "kind": kind, "step": file.step, "config": config}
    return DescribedWeights(file.path, weights, meta, ema, file.profiles.get("none"))


def _import_line(file: ForeignFile, choices: Choices) -> Iterator[str]:
    try:
        _described(file, choices)
    except FlowAnchorError as error:
        yield f"  to import    {error}"
    else:
        names = ("backbone", "kind", "interval", "num_heads", "num_classes")
        told = {"ema_profile": choices.ema, **{name: getattr(choices, name) for name in names}}
        settings = "".join(f" {name}={value}" for name, value in told.items() if value is not None)
        yield f"  to import    python src/convert.py checkpoint={file.path} output=NAME.safetensors{settings}"


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


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name].detach().clone() for name in weights}  # clone: no larger storage behind a view
