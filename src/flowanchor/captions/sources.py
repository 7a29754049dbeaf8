"""Captioned images: a folder with a table, or tars of WebDataset."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from itertools import count as counting
from pathlib import Path
from typing import Any

import numpy as np

from flowanchor.base.reading import open_regular, read_regular, shown
from flowanchor.data.pictures import BYTES
from flowanchor.data.tar_members import Content
from flowanchor.encoding.sources import Source
from flowanchor.encoding.tars import read_member, read_tar, tar_names, tell_unused
from flowanchor.errors import ConfigError, DataError

TABLES = (".csv", ".jsonl")
NOTE = 1 << 24  # bytes of a line of a table, and of a caption's file in a tar, at most
HEADER = 1 << 15  # bytes of a file that nearly always tell an image's size


class CaptionedSource(Source):
    """Images with their captions; what has none is named in `uncaptioned` and not among the images.

    Attributes:
        captions: for each image, one caption or several.
        uncaptioned: "name: no caption" of images that are left out.
    """

    captions: list[tuple[str, ...]]
    uncaptioned: list[str]

    @abstractmethod
    def read(self, index: int, count: int | None = None) -> bytes:
        """The image's file, undecoded, or its first `count` bytes; raises `OSError` where it cannot be read."""

    def _take(self, found: Iterator[tuple[str, Any]], where: object) -> None:
        self.names, self.captions, self.uncaptioned = [], [], []
        for name, captions in found:
            texts = _texts(captions)
            if texts:
                self.names.append(name)
                self.captions.append(texts)
            else:
                self.uncaptioned.append(f"{shown(name)}: no caption")
        if len(set(self.names)) != len(self.names):
            seen: set[str] = set()
            twice = next(name for name in self.names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise DataError(
                f"{shown(where)} lists the image {shown(twice)} twice: list its captions together, as a JSON list."
            )
        self.labels, self.num_classes = np.zeros(len(self.names), dtype=np.int64), 0

    def digest(self) -> str:
        content = hashlib.sha256()
        for name, captions in zip(self.names, self.captions, strict=True):
            content.update(json.dumps([name, captions]).encode())
        return content.hexdigest()


class TableSource(CaptionedSource):
    """Images named in a CSV or JSONL table with a column of files, relative to the table, and one of captions.

    A caption may be a JSON list of several.
    """

    def __init__(self, table: Path, file: str = "file", caption: str = "caption") -> None:
        self.root = table.parent
        self._take(((str(row[file]), row.get(caption)) for row in _rows(table, file, caption)), table)

    def read(self, index: int, count: int | None = None) -> bytes:
        return read_regular(self.root / self.names[index], BYTES, count=count)


class TarCaptions(CaptionedSource):
    """Tars with `<key>.jpg` (png, webp, ...) and `<key>.txt` or `<key>.json`, whose entry `caption` it is."""

    def __init__(self, tars: list[Path], caption: str = "caption") -> None:
        self.tars = tars
        places, found, unused = {}, [], Counter[str]()
        for number, (path, tar) in enumerate(zip(tars, tar_names(tars), strict=True)):
            content = read_tar(path, ("txt", "json"))
            for key, place in content.images.items():
                places[f"{tar}/{key}"] = (number, place)
                text = None
                for extension, note in content.notes.get(key, {}).items():  # the last one counts
                    text = _caption(note, extension, f"{shown(key)}.{extension} of {shown(path)}", caption)
                found.append((f"{tar}/{key}", text))
            unused += content.unused
        self._take(iter(found), "data.root")
        self._places = [places[name] for name in self.names]
        self.remarks = tuple(tell_unused(unused))

    def read(self, index: int, count: int | None = None) -> bytes:
        number, place = self._places[index]
        return read_member(self.tars[number], place, count)


def open_captions(root: str | None, file: str = "file", caption: str = "caption") -> CaptionedSource:
    """A source by what `root` is: a folder with one table or with tars, a table, or tars written `{000..127}.tar`.

    Raises `ConfigError` and `DataError`.
    """
    if not root:
        raise ConfigError(
            "Which images? Add data.root=FOLDER (tars of images with txt or json, or a CSV or JSONL table)."
        )
    path = Path(root).expanduser()
    if path.suffix in TABLES and path.is_file():
        return TableSource(path, file, caption)
    if str(root).endswith(".tar"):
        from webdataset.shardlists import expand_urls

        return TarCaptions([Path(name) for name in expand_urls(str(path))], caption)
    if not path.is_dir():
        raise DataError(f"There is no folder {path}: set data.root=FOLDER.")
    tables = sorted(entry for entry in path.iterdir() if entry.suffix in TABLES)
    tars = sorted(path.glob("*.tar"))
    if len(tables) == 1 and not tars:
        return TableSource(tables[0], file, caption)
    if tars and not tables:
        return TarCaptions(tars, caption)
    raise DataError(f"{path} holds {len(tables)} tables (CSV, JSONL) and {len(tars)} tars: give one table, or tars.")


def read_captions(table: Path, caption: str = "caption") -> list[str]:
    """The first caption of every row of a table that has one; raises `DataError` without the column."""
    texts = (_texts(row.get(caption)) for row in _rows(table, None, caption))
    return [found[0] for found in texts if found]


def _rows(table: Path, file: str | None, caption: str) -> Iterator[dict[str, Any]]:
    """The rows of a table; raises `DataError` with the number of one that cannot be read or lacks a column."""
    rows = _parsed(table)
    for number in counting(1):
        try:
            row = next(rows, None)
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"Row {number} of {shown(table)} cannot be read ({shown(reason)[:120]}): correct it."
            ) from error
        if row is None:
            return
        if not isinstance(row, dict) or file not in (*row, None) or caption not in row and number == 1:
            known = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"Row {number} of {shown(table)} has no column '{caption}' (it has {shown(known)[:200]}): add it."
                if file is None
                else f"Row {number} of {shown(table)} has no columns '{file}' and '{caption}' (it has "
                f"{shown(known)[:200]}): name them by captions.file= and captions.caption=."
            )
        yield row


def _parsed(table: Path) -> Iterator[Any]:
    with io.TextIOWrapper(open_regular(table), encoding="utf-8-sig", newline="") as text:
        if table.suffix == ".csv":
            yield from csv.DictReader(_lines(text))
        else:
            yield from (json.loads(line) for line in _lines(text) if line.strip())


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(NOTE):
        if len(line) == NOTE:
            raise ValueError(f"a line of more than {NOTE:,} letters")
        yield line


def _texts(found: Any) -> tuple[str, ...]:
    """Captions out of what a table or a tar says: a text, a list of texts, or a text that is a JSON list."""
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):  # a text that begins so
            pass
    texts = [_whole(text) for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
    return tuple(text for text in texts if text)


def _whole(text: str) -> str:
    """Without blanks around it, and without halves of letters, which JSON can hold and no encoder takes."""
    return text.strip().encode(errors="replace").decode()


def _caption(content: Content, extension: str, name: str, caption: str) -> Any:
    """What a file of a tar says of an image."""
    if len(content) > NOTE:
        raise DataError(f"{name} has {len(content):,} bytes, more than a caption: leave it out.")
    text = bytes(content).decode("utf-8", errors="replace")
    if extension == "txt":
        return text
    try:
        return json.loads(text).get(caption)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{name} is no JSON object: it must hold the entry '{caption}'.") from error
