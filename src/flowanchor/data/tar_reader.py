"""Reads tars of samples in order: local ones mapped into memory, anything else through webdataset."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowanchor.base.reading import open_regular, read_regular, shown
from flowanchor.data.npy import Header, byte_count, read_header
from flowanchor.data.tar_members import (
    BLOCK,
    Content,
    Entry,
    compression,
    mapped_members,
    streamed_members,
    tar_files,
)
from flowanchor.data.tar_plan import Stretch
from flowanchor.errors import ConfigError, DataError

INDEX = 1 << 28  # bytes of an index at most
SAMPLES = 10_000_000  # of a tar at most
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members


class TarSample(NamedTuple):
    """The files of one sample by their extensions; `key` is what their names share."""

    url: str
    key: str
    files: dict[str, Content]

    def __str__(self) -> str:
        return f"Sample {shown(self.key)} of {self.url}"


def expand(root: str) -> list[str]:
    """The tars of a folder, or of a path or URL with braces; raises `DataError`."""
    root = root.removeprefix("file:")
    folder = Path(root).expanduser()
    if folder.is_dir():
        found = [str(path) for path in tar_files(folder)]
        if not found:
            raise DataError(f"There are no tars in {root}: encode images by python src/encode.py format=webdataset.")
        return found
    from webdataset.shardlists import expand_urls

    urls: list[str] = expand_urls(root if is_remote(root) else str(folder))
    gone = [url for url in urls if not is_remote(url) and not Path(url).is_file()]
    if gone:
        raise DataError(f"There is no file {gone[0]} ({len(gone)} of {len(urls)}): correct data.root.")
    return urls


def is_remote(url: str) -> bool:
    """Whether it is for webdataset to open: `https://...`, `pipe:...`."""
    scheme, colon, _ = url.partition(":")
    return bool(colon) and len(scheme) > 1 and scheme != "file"


def count_samples(urls: list[str], index: str | None) -> list[int]:
    """Samples per tar: from an index as `encode.py` writes it, else by reading the headers of local files."""
    beside = Path(urls[0]).parent / "index.json"
    together = not any(is_remote(url) or Path(url).parent != beside.parent for url in urls)
    if index is None and together and beside.is_file():
        index = str(beside)
    if index is None:
        remote = [url for url in urls if is_remote(url)]
        if remote:
            raise ConfigError(f"How many samples are in {remote[0]} is not known: add data.index=FILE or URL.")
        return [sum(1 for _ in read_shard(url)) for url in urls]
    known = _read_index(index)
    if len({_tar_name(url) for url in urls}) < len(urls):
        raise DataError(f"{index} tells tars apart by their names, and data.root names two of one name: rename them.")
    missing = [url for url in urls if _tar_name(url) not in known]
    if missing:
        raise DataError(f"{index} does not list {missing[0]}: use the index that was written with these tars.")
    counts = [known[_tar_name(url)] for url in urls]
    for url, count in zip(urls, counts, strict=True):
        most = SAMPLES if is_remote(url) or _is_compressed(url) else Path(url).stat().st_size // (2 * BLOCK)
        if count > most:
            raise DataError(
                f"{url} is truncated, or {index} is wrong: it cannot hold {count:,} samples: copy both again."
            )
    return counts


def read_shard(url: str) -> Iterator[TarSample]:
    """The samples of one tar; raises `DataError` where it cannot be read to its end."""
    key: str | None = None
    files: dict[str, Content] = {}
    for name, content in _members(url):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if folder + slash + stem != key:
            if key is not None:
                yield _sample(url, key, files)
            key, files = folder + slash + stem, {}
        if extension in files:
            raise DataError(f"{url} holds {shown(name)} twice: keys must be unique within a tar.")
        files[extension] = content
    if key is not None:
        yield _sample(url, key, files)


def _sample(url: str, key: str, files: dict[str, Content]) -> TarSample:
    """Raises `DataError` where the key has a dot in it: several samples would be one."""
    dotted = next((extension for extension in files if extension.endswith(".npy")), None)
    if dotted is not None and "npy" not in files:
        raise DataError(
            f"{url} holds {shown(f'{key}.{dotted}')}, which is no latent: in a tar, a key ends at the first dot of a "
            "name, so write the key without dots."
        )
    return TarSample(url, key, files)


def read_stretch(
    urls: list[str], counts: np.ndarray, stretch: Stretch, needed: np.ndarray
) -> Iterator[tuple[int, TarSample]]:
    """Those positions of a stretch that are needed ([stop - start] bool), in the order of the tars."""
    wanted = np.flatnonzero(needed) + stretch.start
    first, last = (int(wanted[0]), int(wanted[-1])) if len(wanted) else (0, -1)
    begin = 0
    for shard in stretch.shards.tolist():
        end = begin + int(counts[shard])
        if begin <= last and end > first:
            yield from _part(urls[shard], begin, end, stretch, needed, last)
        begin = end


def _part(
    url: str, begin: int, end: int, stretch: Stretch, needed: np.ndarray, last: int
) -> Iterator[tuple[int, TarSample]]:
    position, samples = begin, read_shard(url)
    for sample in samples:
        if position > last:
            return
        if position == end - 1 and next(samples, None) is not None:
            raise DataError(f"{url} has more than the {end - begin:,} samples that its index says: use its own index.")
        if position >= stretch.start and needed[position - stretch.start]:
            yield position - stretch.start, sample
        position += 1
    if position < min(end, last + 1):
        raise DataError(f"{url} has {position - begin} samples and its index says {end - begin}: copy it again.")


def decode_array(content: Content) -> np.ndarray:
    """The floating-point numbers of a `.npy` file, without copying them; raises `ValueError`."""
    length = 10 + int.from_bytes(bytes(content[8:10]), "little")
    shape, dtype = header = _header(bytes(content[:length]))
    if byte_count(header) != len(content) - length:
        raise ValueError(f"{len(content) - length:,} bytes for an array of {_by(shape)}, {dtype}")
    return np.frombuffer(content, dtype, offset=length).reshape(shape)


_HEADERS: dict[bytes, Header] = {}


def _header(header: bytes) -> Header:
    """Shape and type; parsing takes longer than reading an array, and all of a set have the same."""
    if header not in _HEADERS:
        if header[6:8] != b"\x01\x00":
            raise ValueError("a .npy file of another version than 1.0")
        if len(_HEADERS) > 1000:  # no set of latents
            _HEADERS.clear()
        _HEADERS[header] = read_header(io.BytesIO(header))
    return _HEADERS[header]


# ------------------------------------------------------------------------------------------------------------- members


def _members(url: str) -> Iterator[tuple[str, Content]]:
    """Names and contents of a tar's files; of a local one that is not compressed, the contents are views of it."""
    for member in _entries(url):
        if member.kind in ("link", "special"):
            raise DataError(f"{url} holds {shown(member.name)}, which is no file but a {member.kind}: leave it out.")
        if member.kind == "file" and not _META.match(member.name):
            yield member.name, member.content


def _entries(url: str) -> Iterator[Entry]:
    if not is_remote(url) and not _is_compressed(url):
        yield from mapped_members(url)
        return
    try:
        with _opened(url) as stream:
            yield from streamed_members(stream, url)
    except DataError:
        raise
    except Exception as error:  # whatever the transport and the decompression raise
        raise DataError(f"{url} cannot be read to its end ({_first(error)}): check it, or the connection.") from error


def _opened(url: str) -> Any:
    if not is_remote(url):
        return open_regular(Path(url.removeprefix("file:")).expanduser())
    from webdataset.gopen import gopen

    return gopen(url)


def _is_compressed(path: str) -> bool:
    try:
        return compression(read_regular(path, most=8, count=8)) is not None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): correct data.root.") from error


def _read_index(index: str) -> dict[str, int]:
    """Samples per tar, by its name."""
    try:
        with _opened(index) as stream:
            shards = json.loads(stream.read(INDEX))["shardlist"]
        known = {_tar_name(shard["url"]): shard["nsamples"] for shard in shards}
        if len(known) < len(shards):
            raise ValueError("two tars of one name")
        wrong = [value for value in known.values() if type(value) is not int or value < 0]
        if wrong:
            raise ValueError(f"nsamples is {str(wrong[0])[:40]!r}")
        return known
    except Exception as error:  # whatever the transport raises, and what is no such index
        raise DataError(f"{index} cannot be read as an index of tars ({_first(error)}): give encode.py's.") from error


def _tar_name(url: str) -> str:
    """The name of the tar in a path, a URL with a query, or a command (`pipe:aws s3 cp s3://data/000.tar -`)."""
    names = re.findall(r"[^/\s?#&=]+\.(?:tar|tgz)(?:\.\w+)?(?=$|[\s?#&])", url)
    return names[0] if names else Path(url).name


def _first(error: Exception) -> str:
    return shown(f"{type(error).__name__} {error.args[0] if error.args else ''}".strip()[:120])


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one value"
