"""Weights of Wan as they are published: a folder of diffusers or of the release, opened where it lies, not converted.

Both have a `config.json` and safetensors files, one or several with an index; the key layout of the release is renamed
by diffusers' own table. A tensor, or the part of it that a process owns, is read from its file when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.plain import read_json
from flowanchor.checkpoints.consolidated import FORMAT, SUFFIX, named_dtype
from flowanchor.checkpoints.trusted import brief
from flowanchor.errors import CheckpointError
from flowanchor.weights import Joined, LazyWeights, local, own_part

CONFIG = "config.json"
DIFFUSERS, RELEASED = "WanTransformer3DModel", "WanModel"
PARTS = ("transformer", "transformer_2")  # of a diffusers pipeline; the release: the two folders below
EXPERTS = ("high_noise_model", "low_noise_model")
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


def is_wan(path: str | Path) -> bool:
    """Whether a folder says that it holds a network of Wan, or a pipeline with one."""
    path = Path(path)
    return path.is_dir() and (_class_name(path) in (DIFFUSERS, RELEASED) or bool(_parts(path)))


def read_wan(folder: Path) -> dict[str, Any]:
    """The folder in the form of a checkpoint of a flow model, its weights not read yet; two experts are one network.

    Raises `CheckpointError` for experts of different sizes, files that are missing, networks that are not text-to-video
    (or image).
    """
    places = [folder / name for name in _parts(folder)] or [folder]
    first, *others = [_settings(place, read_json(place / CONFIG)) for place in places]
    if any(settings != first for settings in others):
        raise CheckpointError(f"{places[0]} and {places[1]} are networks of different sizes: give one of them.")
    target, named = "flowanchor.plugins.backbones.wan.Wan", [""]
    if others:
        target, named = "flowanchor.plugins.backbones.wan_experts.WanExperts", ["high.", "low."]
        first["boundary"] = _boundary(folder)
    weights = {f"student.{name}": WanWeights(place) for name, place in zip(named, places, strict=True)}
    interval = {"_target_": "flowanchor.plugins.objectives.intervals.plain.PlainInterval"}
    config = {"backbone": {"_target_": target, **first}, "objective": {"interval": interval}}
    meta = {"format": FORMAT, "config": config, "kind": "flow", "step": 0}
    return {"flowanchor": meta, "state_dict": Joined(weights)}


def folder_digest_lines(folder: Path) -> Iterator[bytes]:
    """What identifies such a folder without reading its tens of gigabytes: its config, and each file's header."""
    for file in sorted(path for name in ("", *_parts(folder)) for path in (folder / name).iterdir() if path.is_file()):
        yield f"{file.name} {file.stat().st_size}\n".encode()
        with file.open("rb") as content:
            if file.suffix == SUFFIX:
                yield content.read(min(int.from_bytes(content.read(8), "little"), 1 << 26))
            else:
                yield content.read(1 << 20)


class WanWeights(LazyWeights):
    """The tensors of such a folder by their names in diffusers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files = folder, _names(folder)
        self._open: dict[Path, Any] = {}

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return named_dtype(self._slice(name).get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        file, theirs = self._files[name]
        return self._file(file).get_tensor(theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            part = own_part(target)
            local(target).copy_(self._slice(name)[part] if part else self[name])

    def _slice(self, name: str) -> Any:
        file, theirs = self._files[name]
        return self._file(file).get_slice(theirs)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


def diffusers_names(names: list[str]) -> dict[str, str]:
    """Names in either layout -> what diffusers calls them."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    if any("condition_embedder." in name for name in names):
        return {name: name for name in names}
    renamed = convert_wan_transformer_to_diffusers({name: name for name in names})  # moves values, looks at none
    return {theirs: ours for ours, theirs in renamed.items()}


def _names(folder: Path) -> dict[str, tuple[Path, str]]:
    """diffusers' name of each tensor -> its file and its name there."""
    indices = sorted(folder.glob(f"*{SUFFIX}.index.json"))
    if indices:
        index = read_json(indices[0])
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not all(_is_name(file) for file in listed.values()):
            raise CheckpointError(f"{indices[0]} does not list files of its folder by tensor: download it again.")
        places = {name: folder / file for name, file in listed.items()}
    else:
        files = sorted(folder.glob(f"*{SUFFIX}"))
        if not files:
            raise CheckpointError(f"{folder} has a {CONFIG} and no weights (*{SUFFIX}): download them, all files.")
        places = {name: file for file in files for name in _opened(file).keys()}  # noqa: SIM118 - no dictionary
    absent = sorted({file.name for file in places.values() if not file.is_file()})
    if absent:
        raise CheckpointError(
            f"{folder} lacks {', '.join(absent[:3])}{' and others' if len(absent) > 3 else ''}, which its index lists: "
            "download them (a gated release asks you to accept its licence first)."
        )
    return {ours: (places[theirs], theirs) for theirs, ours in diffusers_names(list(places)).items()}


def _is_name(file: object) -> bool:
    """Whether a text is the name of a file in the same folder, and leads nowhere else."""
    return isinstance(file, str) and file.endswith(SUFFIX) and PurePath(file).name == file and "\\" not in file


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(7) == b"version"
        reason = "it is a pointer of Git LFS, not the file itself" if pointer else str(error)
        raise CheckpointError(f"{path} cannot be read ({reason}): download it again.") from error


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
    return [name for name in (*PARTS, *EXPERTS) if _class_name(folder / name) in (DIFFUSERS, RELEASED)]
