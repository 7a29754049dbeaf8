"""From a checkpoint or a run folder to a network that can teach, start a student, or be sampled."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flowanchor.base.files import add_file, superseded
from flowanchor.base.plain import bare
from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.base.torch_files import read_torch
from flowanchor.checkpoints.consolidated import SUFFIX
from flowanchor.checkpoints.description import checked_content, described_network
from flowanchor.checkpoints.huggingface import WEIGHTS, is_published, read_safetensors
from flowanchor.checkpoints.outline import TooLarge, outline
from flowanchor.checkpoints.sharded import is_sharded, read_sharded
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

_LARGE = 4 << 30  # bytes whose reading is announced
_DIGESTS: dict[tuple[Any, ...], str] = {}  # what this process has hashed: names, sizes and times of files -> digest


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

    def record(self) -> dict[str, Any]:
        """Which weights these are, for a record of what was done with them."""
        place = str(Path(self.path).resolve())
        return {"checkpoint": place, "hash": self.digest, "step": self.step, "ema": self.ema, "sources": self.sources}


def latest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint, file or folder, from which a run goes on; None where there is none yet."""
    last = Path(run) / "checkpoints" / "last.ckpt"
    # A save that was cut off between its two last moves leaves the earlier checkpoint under its other name.
    return next((path for path in (last, superseded(last)) if path.is_file() or is_sharded(path)), None)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint behind a path: the file or sharded folder itself, the last one of a run folder, the weights of a
    folder that convert.py published, a folder with the released weights of Wan."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"A checkpoint is one path, and {path!r} is none: give checkpoint=PATH.")
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
    initialise_from: str | Path | Mapping[str, str] | None = None,
    hashed: bool = True,
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
        initialise_from: where the weights lie that adapters stand beside, if not where the run found them.
        hashed: False leaves `digest` empty: the file is not read for it.
    """
    file = find_checkpoint(path)
    content = read_checkpoint(file)
    meta = content["flowanchor"]
    config = meta["config"]
    network, interval = described_network(config, file)
    check(network, "backbone", file)
    check(interval, "objective.interval", file)
    name, weights = select_weights(content, ema, file)
    shapes, weights, sources = outlined(meta, weights, file, initialise_from)
    check_fit(shapes, weights, file)
    with loading_context() if dtype is None else parameters_on_meta():
        backbone = cast(Backbone, build(network, "backbone", file))
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
    )


def outlined(
    meta: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    file: Path,
    elsewhere: str | Path | Mapping[str, str] | None = None,
) -> tuple[Backbone, Mapping[str, Tensor], dict[str, str]]:
    """The network without values, all of its weights, and the digests of those that adapters stand beside.

    `elsewhere`: as in `whole_weights`.
    """
    settings = meta["config"]["backbone"]
    try:
        shapes = outline(settings, file, weights)
    except TooLarge:
        if not (elsewhere or meta["config"].get("initialise_from")):
            raise
        shapes = outline(settings, file, weights, _base(meta, file, elsewhere)[0])
    return shapes, *whole_weights(shapes, weights, meta, file, elsewhere)


def store_low(backbone: Backbone, dtype: torch.dtype) -> None:
    """Give linear layers and convolutions outside `float32_modules` parameters of a lower precision, in place.

    These are what autocast would cast at every call: under it the network answers the same, bit for bit.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype} is no lower precision: use bfloat16 or float16, or none for float32.")
    kept = {inner for module in backbone.float32_modules() for inner in module.modules()}
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, _ConvNd)) and module not in kept:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def whole_weights(
    backbone: Backbone,
    weights: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    file: Path,
    elsewhere: str | Path | Mapping[str, str] | None = None,
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The weights of a whole network: those of `file` and, where it holds adapters alone, those that they stand beside.

    The latter are looked for where the run found them, or `elsewhere`, and are known by their digest.

    Returns them, and the sha256 of each file of the latter by its setting. Raises `CheckpointError` where they are not
    there, or are others than those that were trained with.
    """
    if all(name in weights for name in backbone.borrowed()):
        if elsewhere:
            raise ConfigError(f"{file} holds all its weights: leave out initialise_from={elsewhere}.")
        return weights, {}
    below, digests = _base(meta, file, elsewhere)
    return Overlaid(weights, below), digests


def _base(
    meta: Mapping[str, Any], file: Path, elsewhere: str | Path | Mapping[str, str] | None
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The weights that the adapters of a run stand beside, and their digests."""
    parts: dict[str, Mapping[str, Tensor]] = {}
    digests: dict[str, str] = {}
    recorded = meta.get("sources") or {}
    for name, typed in by_part("initialise_from", elsewhere or meta["config"].get("initialise_from")).items():
        known = recorded.get(name) or {}
        places = [typed] if elsewhere or not known else [typed, known["path"]]
        base, digests[name] = _find_base(file, name, places, known.get("digest"))
        parts[name.partition(".")[2]] = select_weights(read_checkpoint(base), None, base)[1]
    return parts[""] if "" in parts else Joined({f"{part}.": inner for part, inner in parts.items()}), digests


def by_part(setting: str, value: Any) -> dict[str, str]:
    """A setting that names weights, or those of each part of a network: dotted name -> path."""
    if isinstance(value, Mapping):
        return {f"{setting}.{part}": str(path) for part, path in value.items()}
    return {setting: "" if value is None else str(value)}


def _find_base(file: Path, name: str, places: list[str], wanted: str | None) -> tuple[Path, str]:
    """The first of the places that holds the weights of a digest, and that digest."""
    others = []
    for place in places:
        try:
            base = find_checkpoint(place) if place else None
        except CheckpointError:
            base = None
        if base is not None:
            digest = file_digest(base)
            if wanted is None or digest == wanted:
                return base, digest
            others.append(f"{base} has sha256 {digest[:12]}")
    reason = (
        f"the weights that they adapt are not where the run found them ({places[0] or None})"
        if not others
        else f"the weights that they adapt have changed (sha256 {str(wanted)[:12]}; {', '.join(others)})"
    )
    raise CheckpointError(
        f"{file} holds adapters alone, and {reason}: put them there again, or say where they are with {name}=PATH."
    )


def select_weights(content: dict[str, Any], ema: str | None, file: Path) -> tuple[str, Mapping[str, Tensor]]:
    """The student's weights that a name stands for, and that name."""
    profiles: dict[str, Mapping[str, Tensor]] = content.get("ema") or {}
    ema = None if ema is None else str(ema)  # a command line may bring a number
    if ema is not None and ema.startswith("posthoc:"):
        from flowanchor.ema_posthoc import Owner, synthesise

        try:
            width = float(ema.partition(":")[2])
        except ValueError as error:
            raise CheckpointError(f"There is no EMA profile '{ema}': write for example posthoc:0.15.") from error
        owner = Owner.of(file, content)
        return ema, synthesise(file.parent.parent / "ema_snapshots", width, int(content["flowanchor"]["step"]), owner)
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
    """sha256 of a file, hex; of a sharded checkpoint, that of its files' names and contents; of Wan, their headers.

    A file is read once in a process, until its size or times change.
    """
    path, digest = Path(path), hashlib.sha256()
    if is_wan(path):
        for line in folder_digest_lines(path):
            digest.update(line)
        return digest.hexdigest()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [file.stat() for file in files]
    times = [(state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]
    key = (path.is_dir(), *map(str, files), *times)
    if key in _DIGESTS:
        return _DIGESTS[key]
    size = sum(state.st_size for state in states)
    if size > _LARGE:
        rank_zero_info(f"Reading the {size / 1e9:.0f} GB of {path} for their sha256.")
    for file in files:
        if path.is_dir():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        add_file(digest, file)
    return _DIGESTS.setdefault(key, digest.hexdigest())
