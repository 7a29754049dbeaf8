"""One network in one safetensors file: its weights, and in the metadata what is needed to open it alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.files import replacing
from flowanchor.base.plain import parse_json
from flowanchor.base.seal import BLANK, SEAL, seal

FORMAT = 1  # of checkpoints of every kind
SUFFIX = ".safetensors"

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

WRITABLE = tuple(_DTYPES)


def named_dtype(name: str) -> torch.dtype:
    """The type that safetensors calls `name`; one that is not written here counts as whole numbers."""
    return next((dtype for dtype, theirs in _DTYPES.items() if theirs == name), torch.int64)


def write_consolidated(path: Path, weights: Mapping[str, Tensor], meta: dict[str, Any], ema: str) -> int:
    """Write weights, their description and their digest in one move; returns the file's size in bytes.

    Tensors are taken from `weights` one at a time (safetensors' own writer wants all of them at once).

    Args:
        meta: what a checkpoint has under `flowanchor`: config, kind, step.
        ema: which weights these are: the profile's name, or "none" for the raw ones.
    """
    described = {**meta, "format": FORMAT, "ema": ema}
    header: dict[str, Any] = {"__metadata__": {"flowanchor": json.dumps(described), SEAL: BLANK}}
    position = 0
    for name in weights:  # twice: the sizes come first in the file
        tensor = weights[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as draft:
        with draft.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in weights:
                content = weights[name].detach().contiguous().flatten().view(torch.uint8)
                file.write(content.numpy().data)
            size = file.tell()
        seal(draft)
    return size


def is_consolidated(path: Path) -> bool:
    """Whether a path is such a file, by what it says of itself; nothing but its header is read."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "flowanchor" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_consolidated(path: Path, described: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of such a file in the form of a checkpoint; raises `ValueError` for a damaged file.

    `described` takes the place of the file's own description.
    """
    try:
        with safe_open(path, framework="pt") as file:
            own = parse_json((file.metadata() or {}).get("flowanchor", "null"), path)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - mapped, not read
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    meta = own if described is None else described
    if not isinstance(meta, dict):
        return {}
    meta = dict(meta)
    ema = meta.pop("ema", "none")
    if ema == "none":
        return {"flowanchor": meta, "state_dict": {f"student.{name}": tensor for name, tensor in weights.items()}}
    return {"flowanchor": meta, "state_dict": {}, "ema": {ema: weights}}
