"""`manifest.json`: what an encoded data set holds and how it was made."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

from flowanchor.base.files import write_json
from flowanchor.base.plain import read_json
from flowanchor.base.reading import shown
from flowanchor.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1

M = TypeVar("M", bound="Manifest")


@dataclass(frozen=True)
class Shard:
    """One file of a set: `file` is relative to the folder, `count` its images."""

    file: str
    count: int
    bytes: int
    sha256: str


class Manifest:
    """Written last, when a set is complete; a kind of set is a frozen dataclass whose fields are what is written."""

    KIND: ClassVar[str | None] = None  # what `kind` is in the file; sets of latents alone do not say
    shards: tuple[Shard, ...]
    count: int  # images in all
    unreadable: tuple[str, ...]  # images that were left out, relative to the source, and why
    source: dict[str, Any]  # the settings that it was made with, and what the images were like
    format: int

    @abstractmethod
    def describe(self) -> str:
        """One line about the set."""

    def check(self) -> None:  # noqa: B027 - most kinds have nothing to add to their fields' types
        """Raise `ValueError` where values contradict each other."""

    def write(self, folder: Path) -> None:
        """Write it into the folder, in one move."""
        write_json(folder / MANIFEST, asdict(cast(Any, self)))

    def missing(self, folder: Path) -> list[str]:
        """Files of the set that are not in the folder, or not whole, any more."""
        paths = {folder / shard.file: shard for shard in self.shards}
        return [s.file for path, s in paths.items() if not path.is_file() or path.stat().st_size != s.bytes]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(shard.bytes for shard in self.shards)

    @classmethod
    def read(cls: type[M], folder: Path) -> M | None:
        """That of a folder, None where it has none (released latents come without).

        Raises `DataError` for a damaged one, one of another kind, and one of a later format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            content = read_json(path, DataError)
            if content.get("kind") != cls.KIND:
                theirs = content.get("kind") or "latents"
                raise DataError(
                    f"{path} is that of another kind of data, {shown(theirs)[:40]}: use data={shown(theirs)[:40]}, or "
                    f"give a folder of encode.py{f' data={cls.KIND}' if cls.KIND else ''}."
                )
            manifest = _made(cls, content)
            manifest.check()
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({shown(error)[:200]}): run encode.py again, which completes the folder."
            ) from error
        if manifest.format != FORMAT:
            raise DataError(f"{path} has format {manifest.format} and this version reads {FORMAT}.")
        return manifest


@dataclass(frozen=True)
class LatentManifest(Manifest):
    """A set of latents, one size each, in one of two layouts.

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
    unreadable: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def describe(self) -> str:
        flips = ", plain and mirrored" if self.flips else ""
        left_out = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        return (
            f"{self.count:,} images{flips} as latents {' x '.join(map(str, self.shape))} ({self.values}, {self.dtype}) "
            f"in {len(self.shards)} files, {self.size / 1e9:.2f} GB{left_out}"
        )


@dataclass(frozen=True)
class CaptionManifest(Manifest):
    """A set of latents in several sizes with the embeddings of their captions (`flowanchor.encoded.captions`)."""

    KIND = "captions"

    count: int
    shape: tuple[int, int]  # channels and frames of a latent
    text_width: int
    shards: tuple[Shard, ...]
    sizes: tuple[tuple[int, int], ...]  # of the latents in each file: height, width
    codec: dict[str, Any]  # name, digest
    text_encoder: dict[str, Any]  # name, digest
    negative: str  # the negative prompt
    unreadable: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    kind: str = KIND
    format: int = FORMAT

    def check(self) -> None:
        if len(self.sizes) != len(self.shards):
            raise ValueError(f"{len(self.sizes)} sizes of {len(self.shards)} files")

    def describe(self) -> str:
        left_out = f", {len(self.unreadable)} left out" if self.unreadable else ""
        return (
            f"{self.count:,} captioned images in {len(set(self.sizes))} sizes ({self.shape[0]} channels), "
            f"{len(self.shards)} files, {self.size / 1e9:.2f} GB{left_out}"
        )


def _made(kind: Any, content: Any) -> Any:
    """A dataclass out of a dictionary that may hold more; `TypeError` and `ValueError` where it is none of that."""
    check_kinds(dict, content)
    kinds = _annotations(kind)
    return kind(**{f.name: _typed(content[f.name], kinds[f.name]) for f in fields(kind) if f.name in content})


@cache
def _annotations(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(value: Any, kind: Any) -> Any:
    """A value as an annotation says; raises `ValueError` for one of another kind."""
    if kind is Shard:
        return _made(Shard, value)
    if get_origin(kind) is tuple:
        check_kinds(list, value)
        kinds: Sequence[Any] = get_args(kind)
        kinds = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(value):
            raise ValueError(f"{len(value)} values where {len(kinds)} belong")
        return tuple(map(_typed, value, kinds))
    check_kinds(get_origin(kind) or kind, value)
    return value


def check_kinds(kind: type[Any], *values: Any) -> None:
    """Raise `ValueError` for a value of another kind, and for a negative number."""
    for value in values:
        if type(value) is not kind or (kind is int and value < 0):
            raise ValueError(
                f"{str(value)[:40]!r} where a {'number from 0 on' if kind is int else kind.__name__} belongs"
            )
