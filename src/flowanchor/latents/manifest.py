"""`manifest.json`: what an encoded data set holds and how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flowanchor.base.plain import read_json
from flowanchor.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One file of latents: `file` is relative to the folder."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Written last, when a data set is complete.

    Two layouts:

    - `safetensors` (the released one): files of `latents` [N, C, h, w], `latents_flip` (the mirrored images' latents)
      and `labels` [N] int64;
    - `webdataset`: tars with `<key>.npy` [F, C, h, w] (F = 2 with the mirrored image, else 1) and `<key>.cls`.

    `values` is `sample` (draws from the posterior) or `moments` (C counts twice in the files: mean, then log-variance).
    """

    layout: str  # safetensors | webdataset
    values: str  # sample | moments
    shape: tuple[int, int, int]  # of one latent: C, h, w (C without the log-variance)
    count: int  # images; each one twice in the data, where `flips`
    flips: bool
    dtype: str  # of the stored values: float32 | float16 | bfloat16
    image_size: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    codec: dict[str, Any] = field(default_factory=dict)  # name, digest (of weights and settings)
    seed: int = 0  # of the posterior's draws
    shards: tuple[Shard, ...] = ()
    unreadable: tuple[str, ...] = ()  # images that were left out, relative to the source
    source: dict[str, Any] = field(default_factory=dict)  # where the images came from
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into the folder, in one move."""
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a folder, None where it has none (the released files come without); raises `DataError`."""
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            content = read_json(path, DataError)
            known = {f.name for f in fields(cls)}
            found = {k: v for k, v in content.items() if k in known}
            for name in ("shape", "class_names", "unreadable"):
                found[name] = tuple(found.get(name, ()))
            found["shards"] = tuple(Shard(**shard) for shard in found.get("shards", ()))
            manifest = cls(**found)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}): run encode.py again, which completes the folder.") from error
        if manifest.format != FORMAT:
            raise DataError(f"{path} has format {manifest.format} and this version reads {FORMAT}.")
        return manifest
