"""What a file is, in words: for `convert.py inspect=FILE`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flowanchor.checkpoints.adapters import outlined
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.fit import fit_of
from flowanchor.checkpoints.format import Choices
from flowanchor.checkpoints.formats import format_of
from flowanchor.checkpoints.read import is_ours, read_checkpoint, select_weights
from flowanchor.checkpoints.summary import count, fit_lines, network_lines
from flowanchor.errors import FlowAnchorError

SHOWN = 20  # names of classes


def inspect_file(path: str | Path, choices: Choices) -> str:
    """A report of several lines; raises `CheckpointError` for what cannot be read safely."""
    file = find_checkpoint(path)
    return "\n".join(_ours(file) if is_ours(file) else format_of(file).inspect(file, choices))


def _ours(file: Path) -> Iterator[str]:
    content = read_checkpoint(file)
    meta = content["flowanchor"]
    names = [*(content.get("ema") or {}), *(["none"] if len(content["state_dict"]) else [])]
    yield f"{file}: a checkpoint of flowanchor"
    yield f"  trained as   {meta['kind']}, step {meta['step']}"
    for name in names:
        _, weights = select_weights(content, name, file)
        yield f"  weights      {name}: {count(weights)}"
    known = meta.get("class_names") or []
    if known:
        more = f" and {len(known) - SHOWN} others" if len(known) > SHOWN else ""
        yield f"  classes      {', '.join(known[:SHOWN])}{more}"
    backbone = meta["config"].get("backbone") or {}
    yield from network_lines(backbone)
    try:
        network, whole, _ = outlined(meta, select_weights(content, None, file)[1], file)
        yield from fit_lines(fit_of(network, whole))
    except FlowAnchorError as error:
        yield f"  no match     {error}"
