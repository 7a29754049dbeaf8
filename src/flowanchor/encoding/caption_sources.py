"""Captioned images: a folder with a table, or tars of WebDataset."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowanchor.base.reading import read_regular, shown
from flowanchor.base.tables import NOTE, is_table, read_rows, texts_in
from flowanchor.data.picture_files import file_mark, tell_unused
from flowanchor.data.pictures import BYTES
from flowanchor.data.tar_members import Content
from flowanchor.encoding.sources import Source, beside_tars, tars_of
from flowanchor.encoding.tars import read_member, read_tar, tar_names
from flowanchor.errors import ConfigError, DataError


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

    def _take(self, found: Iterable[tuple[str, tuple[str, ...]]], where: object) -> None:
        self.names, self.captions, self.uncaptioned = [], [], []
        for name, texts in found:
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
    """Images named in a CSV, TSV or JSONL table with a column of files, relative to the table, and one of captions.

    A caption may be a JSON list of several.
    """

    def __init__(self, table: Path, file: str = "file", caption: str = "caption") -> None:
        self.root = table.parent
        self._take(self._named(table, file, caption), table)
        self.marks = [str(file_mark(self.root / name)) for name in self.names]

    def _named(self, table: Path, file: str, caption: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for row in read_rows(table, file, caption):
            name = row.cells.get(file)
            if not isinstance(name, str) or not name.strip():
                held = shown(", ".join(map(str, row.cells)))[:200]
                advice = "correct it, or name the columns by captions.file= and captions.caption="
                raise row.refused(f"names no image under '{shown(file)}' (it has {held})", advice)
            yield name, texts_in(row.cells.get(caption))

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
                texts: tuple[str, ...] = ()
                for extension, note in content.notes.get(key, {}).items():  # the last one that holds any counts
                    name = f"{shown(key)}.{extension} of {shown(path)}"
                    texts = texts_in(_caption(note, extension, name, caption)) or texts
                found.append((f"{tar}/{key}", texts))
            unused += content.unused
        self._take(found, "data.root")
        self._places = [places[name] for name in self.names]
        marks = [str(file_mark(path)) for path in tars]
        self.marks = [marks[number] for number, _ in self._places]
        self.remarks = tuple(tell_unused(unused, "the tars"))

    def read(self, index: int, count: int | None = None) -> bytes:
        number, place = self._places[index]
        return read_member(self.tars[number], place, count)


def open_captions(root: str | None, file: str = "file", caption: str = "caption") -> CaptionedSource:
    """A source by what `root` is: a folder with one table or with tars, a table, or tars written `{000..127}.tar`.

    Raises `ConfigError` and `DataError`.
    """
    if not root:
        raise ConfigError(
            "Which images? Add data.root=FOLDER (tars of images with txt or json, or a CSV, TSV or JSONL table)."
        )
    path = Path(root).expanduser()
    if is_table(path) and path.is_file():
        return TableSource(path, file, caption)
    tables = sorted(entry for entry in path.iterdir() if is_table(entry)) if path.is_dir() else []
    tars = tars_of(path)
    if len(tables) == 1 and not tars:
        return TableSource(tables[0], file, caption)
    if tars and not tables:
        source = TarCaptions(tars, caption)
        source.remarks += tuple(beside_tars(path))
        return source
    raise DataError(f"{path} holds {len(tables)} tables (CSV, JSONL) and {len(tars)} tars: give one table, or tars.")


def _caption(content: Content, extension: str, name: str, caption: str) -> Any:
    """What a file of a tar says of an image."""
    if len(content) > NOTE:
        raise DataError(f"{name} has {len(content):,} bytes, more than a caption: leave it out.")
    try:
        text = bytes(content).decode("utf-8-sig")
        return text if extension == "txt" else json.loads(text).get(caption)
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: correct it.") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{name} is no JSON object: it must hold the entry '{caption}'.") from error
