"""`manifest.json`: what an encoded data set holds and how it was made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flowanchor.base.files import write_json
from flowanchor.base.plain import read_json
from flowanchor.base.reading import shown
from flowanchor.errors import DataError

MANIFEST = "manifest.json"
LONGEST = 1 << 28  # bytes of a manifest at most
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
        write_json(folder / MANIFEST, asdict(self))

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
                found[name] = tuple(_listed(found.get(name, [])))
            found["shards"] = tuple(Shard(**shard) for shard in _listed(found.get("shards", [])))
            manifest = cls(**found)
            manifest._check()
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({shown(error)[:200]}): run encode.py again, which completes the folder."
            ) from error
        if manifest.format != FORMAT:
            raise DataError(f"{path} has format {manifest.format} and this version reads {FORMAT}.")
        return manifest

    def _check(self) -> None:
        """Raise `ValueError` where a value is of another kind than it has to be."""
        check_kinds(str, self.layout, self.values, self.dtype, *self.class_names, *self.unreadable)
        check_kinds(int, *self.shape, self.count, self.image_size, self.num_classes, self.seed, self.format)
        check_kinds(bool, self.flips)
        check_kinds(dict, self.codec, self.source)
        check_shards(self.shards)
        if len(self.shape) != 3:
            raise ValueError(f"its shape has {len(self.shape)} sides")


def check_shards(shards: tuple[Shard, ...]) -> None:
    """Raise `ValueError` where a file is not described by its name, two numbers and a hash."""
    for shard in shards:
        check_kinds(str, shard.file, shard.sha256)
        check_kinds(int, shard.count, shard.bytes)


def check_kinds(kind: type[Any], *values: Any) -> None:
    """Raise `ValueError` for a value of another kind, and for a negative number."""
    for value in values:
        if type(value) is not kind or (kind is int and value < 0):
            raise ValueError(
                f"{str(value)[:40]!r} where a {'number from 0 on' if kind is int else kind.__name__} belongs"
            )


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError(f"{str(found)[:40]!r} where a list belongs")
    return found
