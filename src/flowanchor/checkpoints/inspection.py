"""What a file is, in words: for `convert.py inspect=FILE`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.checkpoints.foreign import ForeignFile, read_foreign
from flowanchor.checkpoints.importing import Choices, import_foreign
from flowanchor.checkpoints.infer import Fit, compare, fit_of, infer_backbone
from flowanchor.checkpoints.load import find_checkpoint, is_ours, outlined, read_checkpoint, select_weights
from flowanchor.errors import CheckpointError, FlowAnchorError

_SHOWN = 20  # names of each kind


def inspect_file(path: str | Path, choices: Choices) -> str:
    """A report of several lines; raises `CheckpointError` for what cannot be read safely."""
    return "\n".join(_ours(path) if is_ours(path) else _foreign(path, choices))


def _ours(path: str | Path) -> Iterator[str]:
    file = find_checkpoint(path)
    content = read_checkpoint(file)
    meta = content["flowanchor"]
    names = [*(content.get("ema") or {}), *(["none"] if len(content["state_dict"]) else [])]
    yield f"{file}: a checkpoint of flowanchor"
    yield f"  trained as   {meta['kind']}, step {meta['step']}"
    for name in names:
        _, weights = select_weights(content, name, file)
        yield f"  weights      {name}: {count(weights)}"
    backbone = meta["config"].get("backbone") or {}
    yield from _described(backbone)
    try:
        network, whole, _ = outlined(meta, select_weights(content, None, file)[1], file)
        yield from _fit(fit_of(network, whole))
    except FlowAnchorError as error:
        yield f"  no match     {error}"


def _foreign(path: str | Path, choices: Choices) -> Iterator[str]:
    file = read_foreign(path)
    yield f"{file.path}: {file.kind}"
    trained = f"{file.objective or 'not told: kind=flow or kind=shortcut'}, step {file.step or 'not told'}"
    yield f"  trained as   {trained}"
    for name, weights in file.profiles.items():
        yield f"  weights      {name}: {count(weights)}{' (the default)' if name == file.default else ''}"
    if file.others:
        yield f"  also holds   {', '.join(file.others)}"
    yield from _listed("of no profile", file.ignored)
    _, weights = file.weights(choices.ema)
    if any(key.startswith("decoder.") for key in weights):
        yield f"  backbone     none: these are the weights of an autoencoder, for codec.weights={file.path}"
        return
    try:
        backbone = infer_backbone(weights, choices.backbone, choices.num_heads, choices.num_classes)
    except CheckpointError as error:
        yield f"  backbone     {error}"
        return
    yield from _described(backbone)
    try:
        yield from _fit(compare(weights, backbone, file.path))
    except FlowAnchorError as error:
        yield f"  no match     {error}"
        return
    yield from _import_line(file, choices)


def _import_line(file: ForeignFile, choices: Choices) -> Iterator[str]:
    try:
        import_foreign(file, choices)
    except FlowAnchorError as error:
        yield f"  to import    {error}"
    else:
        names = ("backbone", "kind", "interval", "num_heads", "num_classes")
        told = {"ema_profile": choices.ema, **{name: getattr(choices, name) for name in names}}
        settings = "".join(f" {name}={value}" for name, value in told.items() if value is not None)
        yield f"  to import    python src/convert.py checkpoint={file.path} output=NAME.safetensors{settings}"


def count(weights: Mapping[str, Tensor]) -> str:
    """How many tensors and numbers, and of which types."""
    types = Counter(str(weights[name].dtype).removeprefix("torch.") for name in weights)
    numbers = sum(weights[name].numel() for name in weights)
    return f"{len(weights)} tensors, {numbers:,} numbers, {', '.join(sorted(types))}"


def _described(backbone: Mapping[str, Any]) -> Iterator[str]:
    settings = [f"{key}={value}" for key, value in backbone.items() if key != "_target_" and value is not None]
    yield f"  backbone     {backbone.get('_target_', 'not described')}"
    for first in range(0, len(settings), 6):
        yield f"               {' '.join(settings[first : first + 6])}"


def _fit(fit: Fit) -> Iterator[str]:
    yield f"  matched      {fit.matched} of {fit.matched + len(fit.missing) + len(fit.reshaped)} names and shapes"
    yield from _listed("missing", fit.missing)
    yield from _listed("unknown", fit.unknown)
    yield from _listed("other shape", fit.reshaped)


def _listed(title: str, names: tuple[str, ...]) -> Iterator[str]:
    for name in names[:_SHOWN]:
        yield f"  {title:<12} {name}"
    if len(names) > _SHOWN:
        yield f"  {title:<12} and {len(names) - _SHOWN} more"
