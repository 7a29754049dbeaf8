"""Weights of Wan as they are published, in a folder of diffusers or of the release: opened where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.plain import read_json
from flowanchor.base.trusted import brief
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.checkpoints.format import Choices, DescribedWeights, Format
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.formats.base_pipeline import BasePipeline, is_exported
from flowanchor.plugins.formats.folder_weights import digest_of
from flowanchor.plugins.formats.wan_pair import join_experts
from flowanchor.plugins.formats.wan_weights import CONFIG, WanWeights
from flowanchor.weights import Joined

DIFFUSERS, RELEASED = "WanTransformer3DModel", "WanModel"
ANYFLOW = "AnyFlowTransformer3DModel"  # diffusers', a Wan that is told the end of an average too
KINDS = (DIFFUSERS, RELEASED, ANYFLOW)
PARTS = ("transformer", "transformer_2")  # of a diffusers pipeline; the release: the two folders below
EXPERTS = ("high_noise_model", "low_noise_model")
INTERVALS = "flowanchor.plugins.objectives.intervals"
BOUNDARY = 0.875  # noise level, of the released text-to-video network

# Names in the release's config, and in ours.
_RELEASED_SETTINGS = {
    "num_heads": "num_attention_heads", "in_dim": "in_channels", "ffn_dim": "ffn_dim", "num_layers": "num_layers",
    "freq_dim": "freq_dim", "text_dim": "text_dim", "text_len": "text_len", "patch_size": "patch_size", "eps": "eps",
    "cross_attn_norm": "cross_attn_norm",
}  # fmt: skip
_DIFFUSERS_SETTINGS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "ffn_dim", "num_layers", "freq_dim", "text_dim",
    "patch_size", "cross_attn_norm", "qk_norm", "eps", "rope_max_seq_len",
)  # fmt: skip


class WanFolder(Format):
    """Folders of Wan's networks, of diffusers and of the release; written as a pipeline of diffusers.

    Args:
        pipeline: folder of a pipeline whose VAE, text encoder and tokenizer a written one takes.
        link: link these instead of copying them.
        dtype: name of the type in which weights are written, but for those that diffusers keeps in float32; None: as
            they are.
    """

    name = "diffusers"
    suffix = ""
    in_place = True
    casts = False
    parts = ("high", "low")

    def __init__(self, pipeline: str | Path | None = None, link: bool = False, dtype: str | None = None) -> None:
        self.pipeline, self.link, self.dtype = pipeline, link, dtype

    def recognises(self, path: Path) -> bool:
        """Whether a folder says that it holds a network of Wan, or a pipeline with one."""
        return path.is_dir() and (_class_name(path) in KINDS or bool(_parts(path)))

    def read(self, path: Path, choices: Choices) -> DescribedWeights:
        """As a flow model, or the student that an AnyFlow is; two experts are one network.

        Raises `CheckpointError` for experts of different sizes, files that are missing, networks that are not
        text-to-video (or image).
        """
        return _described(path)

    def digest(self, path: Path) -> str:
        """Of what identifies such a folder without reading its tens of gigabytes: its config, each file's header."""
        return digest_of(path / name for name in ("", *_parts(path)))

    def join(self, paths: Mapping[str, str], choices: Choices) -> DescribedWeights:
        """Two experts that were distilled one after the other."""
        return join_experts(paths, choices.ema)

    def check(self) -> None:
        if not self.pipeline:
            raise ConfigError(
                "format=diffusers writes a pipeline of Wan, and needs its VAE, text encoder and tokenizer: add "
                "pipeline=FOLDER, a diffusers pipeline of Wan that has them (format=huggingface for other networks)."
            )
        BasePipeline.read(self.pipeline)

    def replaces(self, output: Path) -> bool:
        return is_exported(output)

    def write(self, given: DescribedWeights, output: Path) -> str:
        from flowanchor.plugins.formats.wan_pipeline import export_pipeline  # diffusers takes seconds to import

        base, dtype = BasePipeline.read(str(self.pipeline)), None if self.dtype is None else DTYPES[self.dtype]
        return f"{export_pipeline(given, base, output, dtype, self.link):,} parameters"


def _described(folder: Path) -> DescribedWeights:
    places = [folder / name for name in _parts(folder)] or [folder]
    first, *others = [_settings(place, read_json(place / CONFIG)) for place in places]
    if any(settings != first for settings in others):
        raise CheckpointError(f"{places[0]} and {places[1]} are networks of different sizes: give one of them.")
    target, named = "flowanchor.plugins.backbones.wan.Wan", [""]
    if others:
        target, named = "flowanchor.plugins.backbones.wan_experts.WanExperts", ["high.", "low."]
        first["boundary"] = _boundary(folder)
    weights = {name: WanWeights(place) for name, place in zip(named, places, strict=True)}
    interval: dict[str, Any] = {"_target_": f"{INTERVALS}.plain.PlainInterval"}
    config: dict[str, Any] = {"backbone": {"_target_": target, **first}, "objective": {"interval": interval}}
    meta = {"format": FORMAT, "config": config, "kind": "flow", "step": 0}
    if first.get("end_time"):
        meta["kind"], config["sampler"] = "shortcut", _sampler(folder)
        interval |= {"_target_": f"{INTERVALS}.end_time.EndTimeInterval", "end_time": first["end_time"]}
    return DescribedWeights(folder, weights[""] if "" in weights else Joined(weights), meta)


def _settings(folder: Path, config: Any) -> dict[str, Any]:
    """The network's arguments, in either config; raises `CheckpointError` where they are none."""
    try:
        return _arguments(folder, config)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} does not describe a Wan ({type(error).__name__} {brief(error)}): download it again."
        ) from error


def _arguments(folder: Path, config: Any) -> dict[str, Any]:
    if config.get("_class_name") == RELEASED:
        settings = {ours: config[theirs] for theirs, ours in _RELEASED_SETTINGS.items() if theirs in config}
        settings["attention_head_dim"] = config["dim"] // config["num_heads"]
        text_only = config.get("model_type", "t2v") in ("t2v", "ti2v")
        channels = config.get("out_dim", config["in_dim"])
    else:
        settings = {name: config[name] for name in _DIFFUSERS_SETTINGS if config.get(name) is not None}
        if config.get("_class_name") == ANYFLOW:
            settings |= _gated(folder, config)
        text_only = config.get("image_dim") is None and config.get("added_kv_proj_dim") is None
        channels = config.get("out_channels") or config["in_channels"]
    if not text_only or channels != settings["in_channels"]:
        raise CheckpointError(
            f"{folder} is a Wan that is conditioned on an image: give a text-to-video one, which makes images too."
        )
    # What is drawn unless a size is asked for: the network's usual one, in whole patches.
    patches = settings.get("patch_size", (1, 2, 2))
    for name, usual, patch in zip(("frames", "height", "width"), (1, 60, 104), patches, strict=True):
        settings[name] = -(-usual // patch) * patch
    return settings


def _gated(folder: Path, config: Any) -> dict[str, Any]:
    told = config.get("deltatime_type", "r")
    if told != "r":
        raise CheckpointError(
            f"{folder} is an AnyFlow that is told {told} in place of the end, r: give one with deltatime_type=r, as "
            "released."
        )
    return {"end_time": "gated", "end_time_gate": float(config.get("gate_value", 0.25))}


def _sampler(pipeline: Path) -> dict[str, Any]:
    """Of an AnyFlow: four steps on the grid that its scheduler says."""
    found = _entry(pipeline / "scheduler" / "scheduler_config.json", "shift")
    shift = float(found) if isinstance(found, (int, float)) and found > 0 else 1.0
    target = "flowanchor.plugins.samplers.meanflow.MeanFlowSampler"
    return {"_target_": target, "steps": 4, "timestep_shift": 0.0 if shift == 1 else 1 / shift}


def _boundary(pipeline: Path) -> float:
    """The noise level from which on a pipeline asks its first network; as released where it does not say."""
    found = _entry(pipeline / "model_index.json", "boundary_ratio")
    return float(found) if isinstance(found, (int, float)) else BOUNDARY


def _class_name(folder: Path) -> str | None:
    found = _entry(folder / CONFIG, "_class_name")
    return found if isinstance(found, str) else None


def _entry(file: Path, key: str) -> Any:
    """One entry of a JSON file; None where there is none."""
    try:
        found = read_json(file)
    except (OSError, CheckpointError):
        return None
    return found.get(key) if isinstance(found, dict) else None


def _parts(folder: Path) -> list[str]:
    """The networks of Wan in the folders of a pipeline or of a release with two experts."""
    return [name for name in (*PARTS, *EXPERTS) if _class_name(folder / name) in KINDS]
