"""Reads tars of samples in order: local ones mapped into memory, anything else through webdataset."""

from __future__ import annotations

import io
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowanchor.data.tar_plan import Stretch
from flowanchor.errors import ConfigError, DataError

BLOCK = 512
Content = bytes | memoryview


class TarSample(NamedTuple):
    """The files of one sample by their extensions; `key` is what their names share."""

    url: str
    key: str
    files: dict[str, Content]

    def __str__(self) -> str:
        return f"Sample {self.key} of {self.url}"


def expand(root: str) -> list[str]:
    """The tars of a folder, or of a path or URL with braces; raises `DataError`."""
    root = root.removeprefix("file:")
    folder = Path(root).expanduser()
    if folder.is_dir():
        found = [str(path) for path in sorted(folder.glob("*.tar"))]
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
    if index is None and not is_remote(urls[0]) and beside.is_file():
        index = str(beside)
    if index is None:
        remote = [url for url in urls if is_remote(url)]
        if remote:
            raise ConfigError(f"How many samples are in {remote[0]} is not known: add data.index=FILE or URL.")
        return [sum(1 for _ in read_shard(url)) for url in urls]
    known = {_tar_name(shard["url"]): int(shard["nsamples"]) for shard in _read_index(index)}
    missing = [url for url in urls if _tar_name(url) not in known]
    if missing:
        raise DataError(f"{index} does not list {missing[0]}: use the index that was written with these tars.")
    return [known[_tar_name(url)] for url in urls]


def read_shard(url: str) -> Iterator[TarSample]:
    """The samples of one tar; raises `DataError` where it cannot be read to its end."""
    members = _streamed(url) if is_remote(url) or not _is_plain(url) else _mapped(url)
    key: str | None = None
    files: dict[str, Content] = {}
    for name, content in members:
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if folder + slash + stem != key:
            if key is not None:
                yield TarSample(url, key, files)
            key, files = folder + slash + stem, {}
        files[extension] = content
    if key is not None:
        yield TarSample(url, key, files)


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
    position = begin
    for sample in read_shard(url):
        if position >= end or position > last:
            return
        if position >= stretch.start and needed[position - stretch.start]:
            yield position - stretch.start, sample
        position += 1
    if position < min(end, last + 1):
        raise DataError(f"{url} has {position - begin} samples and its index says {end - begin}: copy it again.")


def decode_array(content: Content) -> np.ndarray:
    """The array of a `.npy` file, without copying its values; raises `ValueError`."""
    length = 10 + int.from_bytes(bytes(content[8:10]), "little")
    shape, dtype = _header(bytes(content[:length]))
    return np.frombuffer(content, dtype, offset=length).reshape(shape)


_HEADERS: dict[bytes, tuple[tuple[int, ...], np.dtype[Any]]] = {}


def _header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type; parsing takes longer than reading an array, and all of a set have the same."""
    if header not in _HEADERS:
        stream = io.BytesIO(header)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("a .npy file of another version than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if fortran or dtype.kind != "f":
            raise ValueError("an array of other numbers than floating-point ones, or in Fortran's order")
        _HEADERS[header] = (shape, dtype)
    return _HEADERS[header]


# ------------------------------------------------------------------------------------------------------------- members


def _is_plain(url: str) -> bool:
    """Whether a local tar starts as those that `_mapped` reads; others have long names or are compressed."""
    try:
        with open(url, "rb") as file:
            header = file.read(BLOCK)
    except OSError as error:
        raise DataError(f"{url} cannot be read ({error}): correct data.root.") from error
    return header[257:262] == b"ustar" and header[156:157] in b"0\0"


def _mapped(url: str) -> Iterator[tuple[str, Content]]:
    """Names and contents of a local tar's files; the contents are views of the file."""
    with open(url, "rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    offset, name = 0, ""
    while offset + BLOCK <= len(whole):
        header = bytes(whole[offset : offset + BLOCK])
        if not header.rstrip(b"\0"):
            return
        try:
            size = int(header[124:136].rstrip(b" \0") or b"0", 8)
            names = [part.rstrip(b"\0").decode() for part in (header[345:500], header[:100])]
        except ValueError as error:
            raise DataError(f"{url} is damaged after sample {name}: copy it again.") from error
        name = "/".join(filter(None, names))
        offset += BLOCK
        if offset + size > len(whole):
            raise DataError(f"{url} is truncated within {name}: copy it again.")
        kind = header[156:157]
        if kind in b"0\0":
            yield name, whole[offset : offset + size]
        elif kind != b"5":  # a folder
            raise DataError(f"{url} holds {name}, a special file: write the tar with plain names (format ustar).")
        offset += -(-size // BLOCK) * BLOCK
    raise DataError(f"{url} is truncated after {name}: copy it again.")


def _streamed(url: str) -> Iterator[tuple[str, Content]]:
    """The same from anything that webdataset opens."""
    from webdataset.gopen import gopen
    from webdataset.tariterators import tar_file_expander

    try:
        for member in tar_file_expander([{"url": url, "stream": gopen(url)}]):
            if "fname" in member:  # else it marks the end of a tar
                yield member["fname"], member["data"]
    except DataError:
        raise
    except Exception as error:  # whatever the transport and tarfile raise
        raise DataError(f"{url} cannot be read to its end ({_first(error)}): check it, or the connection.") from error


def _read_index(index: str) -> list[Mapping[str, Any]]:
    from webdataset.gopen import gopen

    try:
        with gopen(index) as stream:
            content: list[Mapping[str, Any]] = json.loads(stream.read())["shardlist"]
        return content
    except Exception as error:  # whatever the transport raises
        raise DataError(f"{index} cannot be read as an index of tars ({_first(error)}): give encode.py's.") from error


def _tar_name(url: str) -> str:
    """The name of the tar in a path, a URL with a query, or a command (`pipe:aws s3 cp s3://data/000.tar -`)."""
    names = re.findall(r"[^/\s?#&=]+\.(?:tar|tgz)(?:\.\w+)?(?=$|[\s?#&])", url)
    return names[0] if names else Path(url).name


def _first(error: Exception) -> str:
    return f"{type(error).__name__} {error.args[0] if error.args else ''}".strip()[:120]
