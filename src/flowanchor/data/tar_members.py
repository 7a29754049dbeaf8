"""The members of a tar, one after the other, each held against the file before it is used.

Python's `tarfile` believes headers: it takes a tar that ends early for a short one, reads names of any length, and can
be kept busy for ever. Here a tar has an end (a block of zeros), every header has a checksum, nothing is longer than the
file, and every step leads forward.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flowanchor.base.reading import open_regular, shown
from flowanchor.base.walk import is_hidden
from flowanchor.errors import DataError

BLOCK = 512
NAMES = 1 << 20  # bytes of a long name or an extended header, at most
STREAMED = 1 << 30  # bytes of a member that does not lie in a file whose size is known
TAIL = 1 << 16  # bytes behind the end that must be zeros, as far as they are there

Content = bytes | memoryview

COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_END = bytes(BLOCK)
_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link"}


class Entry(NamedTuple):
    """A member: its name, `file`, `folder`, `link` or `special`, and where its content begins in the tar."""

    name: str
    kind: str
    offset: int
    content: Content  # of a file


class Blocks(Protocol):
    """A tar from its start to its end."""

    at: int

    def take(self, count: int) -> Content:
        """The next bytes; fewer than asked for only where it ends."""

    def skip(self, count: int) -> None:
        """Leave out the next bytes."""


class _Mapped:
    """A local file, mapped into memory: what is taken are views of it."""

    def __init__(self, path: Path | str) -> None:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            self.view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
        self.at = 0

    def take(self, count: int) -> memoryview:
        start = self.at
        self.at += count
        return self.view[start : self.at]

    def skip(self, count: int) -> None:
        self.at += count


class _Streamed:
    """Whatever can be read, compressed or not."""

    def __init__(self, stream: Any) -> None:
        buffered = io.BufferedReader(_Raw(stream))
        opener = compression(buffered.peek(8)[:8])
        self.stream: Any = buffered if opener is None else opener(buffered)
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > STREAMED:  # of a compressed tar, a few bytes may be the whole of it
            raise ValueError(f"a member of {count / 1e9:.1f} GB")
        pieces = []
        while count and (piece := self.stream.read(min(count, 1 << 20))):
            pieces.append(piece)
            count -= len(piece)
            self.at += len(piece)
        return b"".join(pieces)

    def skip(self, count: int) -> None:
        self.take(count)


class _Raw(io.RawIOBase):
    """Anything with `read` as a file of Python's."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def compression(start: bytes) -> Any:
    """What opens a compressed file that starts so, None for one that is not compressed."""
    return next((opener for magic, opener in COMPRESSIONS.items() if start.startswith(magic)), None)


def tar_files(folder: Path) -> list[Path]:
    """The tars of a folder, in the order of their names; hidden ones (`._0.tar`, macOS's) are none."""
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def mapped_members(path: Path | str) -> Iterator[Entry]:
    """The members of a local tar that is not compressed; raises `DataError` where it is none, damaged or cut off."""
    try:
        source = _Mapped(path)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read ({error.strerror or error}): correct data.root.") from error
    if compression(bytes(source.view[:8])) is not None:
        raise DataError(f"{shown(path)} is compressed, and images are read where they lie: decompress it.")
    return _walk(source, path)


def streamed_members(stream: Any, url: str) -> Iterator[Entry]:
    """Those of a tar that is read once from its start, compressed or not; raises what the stream raises, too."""
    return _walk(_Streamed(stream), url)


def _walk(source: Blocks, url: Path | str) -> Iterator[Entry]:
    name = ""  # of the last member
    told: dict[str, Any] = {}  # what extended headers say of the next one
    while True:
        block = bytes(source.take(BLOCK))
        if len(block) < BLOCK:
            where = f"after {shown(name)}" if name else "before its first file"
            raise DataError(f"{shown(url)} is truncated {where}: copy it again.")
        if block == _END:
            break
        try:
            name, size, kind = _header(block)
            if kind in b"LKxXg":
                if size > NAMES:
                    raise ValueError(f"a name of {size:,} bytes")
                told |= _extended(kind, _whole(source, size, url, name))
                continue
            name, size = told.get("name", name), told.get("size", size)
            if kind == b"S" or "sparse" in told:
                raise ValueError("a file with holes: pack it without --sparse")
        except ValueError as error:
            where = f"is damaged after {shown(name)}" if name else "is damaged or no tar"
            raise DataError(f"{shown(url)} {where} ({error}): copy it again.") from error
        told = {}
        group = _KINDS.get(kind, "special")
        if group == "file":
            if name.endswith("/") and kind == b"\0":  # a folder, before there were kinds
                group = "folder"
            yield Entry(name, group, source.at, _whole(source, size, url, name))
        else:
            if kind not in b"123456":  # these have no content, whatever their size says
                source.skip(size + -size % BLOCK)
            yield Entry(name, group, source.at, b"")
    if bytes(source.take(TAIL)).strip(b"\0"):
        raise DataError(
            f"{shown(url)} goes on behind its end, after {shown(name)}, as tars do that were put behind each other: "
            "keep them apart, or pack their files anew."
        )


def _whole(source: Blocks, size: int, url: Path | str, name: str) -> Content:
    """The content of a member; the source is left where the next header begins."""
    content = source.take(size)
    if len(content) < size:
        raise DataError(f"{shown(url)} is truncated within {shown(name)}: copy it again.")
    source.skip(-size % BLOCK)
    return content


def _header(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and kind; raises `ValueError`."""
    field = block[148:156]
    told = _number(field) - 8 * 32 + sum(field)  # which counts as blanks
    if (1 + told) % 65521 != zlib.adler32(block) & 0xFFFF:  # one and the sum of the bytes, ten times as fast as `sum`
        if told != sum(byte - 256 * (byte > 127) for byte in block):  # as some programs of old add
            raise ValueError("invalid header")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU's own format has other things there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name), _number(block[124:136]), block[156:157]


def _number(field: bytes) -> int:
    """Octal digits, or, with the first bit set, a large number in base 256."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("invalid header")
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ValueError("invalid header")
    return int(digits or b"0", 8)


def _extended(kind: bytes, content: Content) -> dict[str, Any]:
    """What a header says of the next member: `name`, `size`, `sparse`; raises `ValueError`."""
    if kind in b"LK":
        return {"name": _text(bytes(content).partition(b"\0")[0])} if kind == b"L" else {}
    found: dict[str, Any] = {}
    records = bytes(content).rstrip(b"\0") if kind != b"g" else b""  # of all members: a comment, as a rule
    at = 0
    while at < len(records):
        length = records[at : at + 20].partition(b" ")[0]
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(records) - at:
            raise ValueError("invalid extended header")
        key, _, value = records[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        at += int(length)
        if key == b"path":
            found["name"] = _text(value.partition(b"\0")[0])
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise ValueError("invalid extended header")
            found["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = True
    return found


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")
