"""Captioned images: a folder with a table, or tars of WebDataset."""

from __future__ import annotations

import csv
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowanchor.encoding.sources import IMAGES, Member, Source, members
from flowanchor.errors import ConfigError, DataError

TABLES = (".csv", ".jsonl")
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

    def _take(self, found: Iterator[tuple[str, Any]]) -> None:
        self.names, self.captions, self.uncaptioned = [], [], []
        for name, captions in found:
            texts = _texts(captions)
            if texts:
                self.names.append(name)
                self.captions.append(texts)
            else:
                self.uncaptioned.append(f"{name}: no caption")
        if len(set(self.names)) != len(self.names):
            seen: set[str] = set()
            twice = next(name for name in self.names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise DataError(f"The image {twice} is listed twice: list its captions together, as a JSON list.")
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
        self._take((str(row[file]), row.get(caption)) for row in _rows(table, file, caption))

    def read(self, index: int, count: int | None = None) -> bytes:
        with (self.root / self.names[index]).open("rb") as file:
            return file.read(-1 if count is None else count)


class TarCaptions(CaptionedSource):
    """Tars with `<key>.jpg` (png, webp, ...) and `<key>.txt` or `<key>.json`, whose entry `caption` it is."""

    def __init__(self, tars: list[Path], caption: str = "caption") -> None:
        self.tars = tars
        places = {}
        found = []
        for number, path in enumerate(tars):
            for key, place, text in _samples(path, caption):
                name = f"{path.name}/{key}"
                places[name] = (number, *place)
                found.append((name, text))
        self._take(iter(found))
        self._places = [places[name] for name in self.names]

    def read(self, index: int, count: int | None = None) -> bytes:
        number, offset, size = self._places[index]
        with self.tars[number].open("rb") as file:
            file.seek(offset)
            return file.read(size if count is None else min(size, count))


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
    with table.open(encoding="utf-8", newline="") as lines:
        if table.suffix == ".csv":
            rows: Iterator[Any] = iter(csv.DictReader(lines))
        else:
            rows = (json.loads(line) for line in lines if line.strip())
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or file not in (*row, None) or caption not in row and number == 1:
                known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"Row {number} of {table} has no column '{caption}' (it has {known}): add it."
                    if file is None
                    else f"Row {number} of {table} has no columns '{file}' and '{caption}' (it has {known}): name them "
                    "by captions.file= and captions.caption=."
                )
            yield row


def _texts(found: Any) -> tuple[str, ...]:
    """Captions out of what a table or a tar says: a text, a list of texts, or a text that is a JSON list."""
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except ValueError:
            pass
    texts = found if isinstance(found, list) else [found]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _samples(path: Path, caption: str) -> Iterator[tuple[str, tuple[int, int], Any]]:
    """Key, offset and size, caption of each image in a tar."""
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, Any] = {}
    for member in members(path):
        if member.extension in IMAGES:
            images[member.key] = (member.offset, member.size)
        elif member.extension in ("txt", "json"):
            texts[member.key] = _caption(member, path, caption)
    for key, place in images.items():
        yield key, place, texts.get(key)


def _caption(member: Member, path: Path, caption: str) -> Any:
    text = member.read().decode("utf-8", errors="replace")
    if member.extension == "txt":
        return text
    try:
        return json.loads(text).get(caption)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{member.name} of {path} is no JSON object: it must hold the entry '{caption}'.") from error
