"""From a checkpoint or a run folder to a network that can teach, start a student, or be sampled."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flowanchor.base.plain import bare
from flowanchor.base.torch_files import read_torch
from flowanchor.checkpoints.consolidated import SUFFIX
from flowanchor.checkpoints.description import checked_content, described_network
from flowanchor.checkpoints.huggingface import WEIGHTS, is_published, read_safetensors
from flowanchor.checkpoints.outline import TooLarge, outline
from flowanchor.checkpoints.sharded import is_sharded, read_sharded, superseded
from flowanchor.checkpoints.trusted import build, check
from flowanchor.checkpoints.wan_folder import folder_digest_lines, is_wan, read_wan
from flowanchor.deferred import is_deferred, loading_context, materialise, parameters_on_meta
from flowanchor.errors import CheckpointError, ConfigError, FlowAnchorError
from flowanchor.interfaces import Backbone, Interval
from flowanchor.weights import (
    Joined,
    Overlaid,
    Renamed,
    check_finite,
    copy_weights,
    dtype_of,
    kind_of,
    shape_of,
)


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


def latest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint, file or folder, from which a run goes on; None where there is none yet."""
    last = Path(run) / "checkpoints" / "last.ckpt"
    # A save that was cut off between its two last moves leaves the earlier checkpoint under its other name.
    return next((path for path in (last, superseded(last)) if path.is_file() or is_sharded(path)), None)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint behind a path: the file or sharded folder itself, the last one of a run folder, the weights of a
    folder that convert.py published, a folder with the released weights of Wan."""
    path = Path(path).expanduser()
    if path.is_dir():
        inside = (
            path
            if is_sharded(path) or is_wan(path)
            else path / WEIGHTS
            if is_published(path)
            else latest_checkpoint(path)
        )
        if inside is None:
            raise CheckpointError(
                f"The folder {path} holds no checkpoints/last.ckpt: "
                "give a run folder that was trained, a .ckpt file, or what convert.py wrote."
            )
        return inside
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint at {path}: give a .ckpt file or the run folder that a training left."
        )
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of ours, read without unpickling foreign code; raises `CheckpointError` else.

    Tensors are mapped from the file, or read from the folder, when they are used.
    """
    file = find_checkpoint(path)
    try:
        content = _read(file)
    except (PermissionError, FlowAnchorError):
        raise
    except Exception as error:  # damaged files make PyTorch raise almost anything
        pickled = zipfile.is_zipfile(file) and isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if pickled else "it is no complete file of torch.save"
        raise CheckpointError(
            f"{file} is not a checkpoint that can be read safely ({reason}): give a .ckpt file written by flowanchor"
            f"{_advice(file)}."
        ) from error
    meta = content.get("flowanchor") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        raise CheckpointError(
            f"{file} was not written by flowanchor (no 'flowanchor' entry): give a .ckpt file of a flowanchor run"
            f"{_advice(file)}."
        )
    return {**content, **checked_content(content, file)}


def _read(file: Path) -> Any:
    if is_wan(file):
        return read_wan(file)
    if file.is_dir():
        return read_sharded(file)
    if file.suffix == SUFFIX:
        return read_safetensors(file)
    return read_torch(file)


def _advice(file: Path) -> str:
    released = file.suffix in (".pt", ".pth", SUFFIX)
    command = f"python src/convert.py checkpoint={file} output=NAME{SUFFIX}"
    return f"; if it is a released checkpoint, convert it first: {command}" if released else ""


def is_ours(path: str | Path) -> bool:
    """Whether a path leads to what looks like a checkpoint of ours; raises `CheckpointError` where nothing is."""
    file = find_checkpoint(path)
    try:
        content = _read(file)
    except PermissionError:
        raise
    except Exception:  # see read_checkpoint
        return file.is_dir()  # a damaged file is foreign until proven ours
    return isinstance(content, dict) and isinstance(content.get("flowanchor"), dict)


def load_model(
    path: str | Path,
    ema: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load the network of a run.

    Args:
        path: a .ckpt file, a sharded checkpoint, a .safetensors file of `convert.py consolidate`, a run folder (its
            `checkpoints/last.ckpt`), or a folder with the weights of Wan, as released or of diffusers.
        ema: name of an EMA profile; None for the run's default one (raw weights where it kept none); "none" for the raw
            weights; "posthoc:0.15" for an average of that relative width, synthesised from the run's snapshots.
        device: where the network goes. Within `defer_loading` it goes nowhere: its weights stay in the file until
            `materialise` asks for them.
        dtype: bfloat16 or float16, for sampling: so the weights of linear layers and convolutions are stored, read
            straight to the device; what the network wants in float32 stays there. None: float32.
    """
    file = find_checkpoint(path)
    content = read_checkpoint(file)
    meta = content["flowanchor"]
    config = meta["config"]
    network, interval = described_network(config, file)
    check(network, "backbone", file)
    check(interval, "objective.interval", file)
    name, weights = select_weights(content, ema, file)
    shapes, weights = outlined(config, weights, file)
    check_fit(shapes, weights, file)
    with loading_context() if dtype is None else parameters_on_meta():
        backbone = cast(Backbone, build(network, "backbone", file))
    load_weights(backbone, weights, file)
    if dtype is not None:
        _store_low(backbone, dtype)
        materialise(backbone, torch.device(device))
        check_finite(dict(backbone.named_parameters()), file)
    return LoadedModel(
        backbone=backbone.eval() if is_deferred(backbone) else backbone.eval().to(device),
        interval=cast(Interval, build(interval, "objective.interval", file)),
        kind=meta["kind"],
        config=config,
        ema=name,
        digest=file_digest(file)[:12],
        path=str(file),
        step=meta["step"],
    )


def outlined(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], file: Path
) -> tuple[Backbone, Mapping[str, Tensor]]:
    """The network without values, and all of its weights: those of a run of adapters, and of what they adapt."""
    try:
        shapes = outline(config["backbone"], file, weights)
    except TooLarge:
        if not config.get("initialise_from"):
            raise
        shapes = outline(config["backbone"], file, weights, _base(config, file))
    return shapes, Overlaid(weights, _base(config, file)) if shapes.borrowed() else weights


def _store_low(backbone: Backbone, dtype: torch.dtype) -> None:
    """Give linear layers and convolutions outside `float32_modules` parameters of a lower precision."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype} is no lower precision: use bfloat16 or float16, or none for float32.")
    kept = {inner for module in backbone.float32_modules() for inner in module.modules()}
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, _ConvNd)) and module not in kept:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def _base(config: Mapping[str, Any], file: Path) -> Mapping[str, Tensor]:
    """The weights that the adapters of a run stand beside."""
    base = config.get("initialise_from")
    try:
        return weights_at(base or "")[0]
    except CheckpointError as error:
        raise CheckpointError(
            f"{file} holds adapters alone, and the weights that they adapt are not where the run found them ({base}): "
            "put them there again."
        ) from error


def select_weights(content: dict[str, Any], ema: str | None, file: Path) -> tuple[str, Mapping[str, Tensor]]:
    """The student's weights that a name stands for, and that name."""
    profiles: dict[str, Mapping[str, Tensor]] = content.get("ema") or {}
    ema = None if ema is None else str(ema)  # a command line may bring a number
    if ema is not None and ema.startswith("posthoc:"):
        from flowanchor.ema_posthoc import synthesise

        try:
            width = float(ema.partition(":")[2])
        except ValueError as error:
            raise CheckpointError(f"There is no EMA profile '{ema}': write for example posthoc:0.15.") from error
        return ema, synthesise(file.parent.parent / "ema_snapshots", width)
    if ema is None and profiles:
        ema = next(iter(profiles))
    raw = content["state_dict"]
    if (ema is None or ema == "none") and len(raw):  # a consolidated file may hold an average alone
        return "none", Renamed(raw, "student.")
    if ema not in profiles:
        known = ", ".join([*profiles, *(["none"] if len(raw) else [])])
        raise CheckpointError(f"{file} holds no EMA profile '{ema}': choose one of {known}.")
    return ema, profiles[ema]


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


def check_fit(
    backbone: Backbone, weights: Mapping[str, Tensor], source: str | Path, optional: tuple[str, ...] = ()
) -> None:
    """Raise `CheckpointError` unless the names, shapes and kinds of numbers are those of a network."""
    ours = backbone.state_dict()
    missing = [key for key in ours if key not in weights and not key.startswith(optional or ("\0",))]
    unexpected = [key for key in weights if key not in ours]
    shared = [key for key in ours if key in weights]
    reshaped = [key for key in shared if ours[key].shape != shape_of(weights, key)]
    others = [key for key in shared if kind_of(ours[key].dtype) != kind_of(dtype_of(weights, key))]
    faults = (missing, unexpected, reshaped, others)
    words = ("lacks", "has the unknown", "has another shape of", "has other numbers than floating-point ones in")
    for what, keys in zip(words, faults, strict=True):
        if keys:
            listed = ", ".join(bare(key) for key in keys[:3])
            listed += f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{source} does not fit this {type(backbone).__name__}: it {what} {listed}; "
                "use the backbone settings it was trained with."
            )


def initialise_student(backbone: Backbone, path: str | Path | Mapping[str, str], ema: str | None = None) -> None:
    """Start a student from the (EMA) weights of an earlier run; a second time embedder that it lacks stays zero.

    `path`: a checkpoint, or one for each part of a network of parts (`{high: PATH, low: PATH}` for two experts).
    """
    weights, source = weights_at(path, ema)
    load_weights(backbone, weights, source, _may_lack(backbone))


def weights_at(path: str | Path | Mapping[str, str], ema: str | None = None) -> tuple[Mapping[str, Tensor], str]:
    """The weights of a checkpoint, or of one for each part, and how to call them in a message."""
    paths = {f"{part}.": where for part, where in path.items()} if isinstance(path, Mapping) else {"": path}
    files = {prefix: find_checkpoint(where) for prefix, where in paths.items()}
    parts = {prefix: select_weights(read_checkpoint(file), ema, file)[1] for prefix, file in files.items()}
    return parts[""] if "" in parts else Joined(parts), " and ".join(map(str, files.values()))


def _may_lack(backbone: Backbone) -> tuple[str, ...]:
    """Names that weights to start from need not have: those of a second time embedder, and of adapters."""
    names, borrowed = list(backbone.state_dict()), backbone.borrowed()
    embedder = [name for name in names if backbone.takes_end_time and "r_embedder." in name]
    return (*embedder, *(name for name in names if borrowed and name not in borrowed))


def file_digest(path: str | Path) -> str:
    """sha256 of a file, hex; of a sharded checkpoint, that of its files' names and contents; of Wan, their headers."""
    path, digest = Path(path), hashlib.sha256()
    if is_wan(path):
        for line in folder_digest_lines(path):
            digest.update(line)
        return digest.hexdigest()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
