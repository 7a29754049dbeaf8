"""Tables of captions (CSV, TSV, JSONL) and lists of prompts: every error names the file, the row and its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count as counting
from pathlib import Path
from typing import Any, BinaryIO

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.base.reading import open_regular, shown
from flowanchor.base.walk import is_hidden
from flowanchor.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLES = (*SEPARATORS, ".jsonl")
NOTE = 1 << 24  # bytes of a line, and of a caption, at most


def is_table(path: Path) -> bool:
    """By its name; hidden files (`._captions.csv`, macOS's) are none."""
    return path.suffix.lower() in TABLES and not is_hidden(path.name)


@dataclass(frozen=True)
class Row:
    """One row of a table, and where it stands: its number among the rows, its (last) line in the file."""

    table: Path
    number: int
    line: int
    cells: Mapping[str, Any]

    def refused(self, why: str, advice: str) -> DataError:
        """The error that says what is wrong with it."""
        return DataError(f"Row {self.number} of {shown(self.table)} {why}, line {self.line}: {advice}.")


def read_rows(table: Path, *columns: str) -> Iterator[Row]:
    """The rows of a table; raises `DataError` for one that cannot be read, and where no row has one of the columns.

    UTF-8, with or without a byte-order mark. CSV: commas, quotes as in RFC 4180, no more cells than the first line has;
    TSV: the same with tabulators. JSONL: one object per line, which need not have every column.
    """
    with _opened(table) as file:
        lines = Lines(file)
        separator = SEPARATORS.get(table.suffix.lower())
        rows = _jsonl(lines) if separator is None else _csv(lines, separator)
        first: Row | None = None
        missing = set(columns)
        for number in counting(1):
            try:
                cells = next(rows, None)
            except (OSError, ValueError, RecursionError, csv.Error) as error:
                undecoded = isinstance(error, UnicodeDecodeError)  # the line behind those that were counted
                broken = Row(table, number, lines.number + undecoded, {})
                raise broken.refused(f"cannot be read ({_reason(error)})", "correct it") from error
            if cells is not None:
                row = Row(table, number, lines.number, cells)
                first = first or row
                missing -= cells.keys()
            if first is not None and missing and (cells is None or separator is not None):
                wanted = f"column{'s' * (len(columns) > 1)} {' and '.join(map(repr, columns))}"
                advice = "name them by captions.file= and captions.caption=" if len(columns) > 1 else "add it"
                held = shown(", ".join(map(str, first.cells)))[:200]
                raise first.refused(f"has no {wanted} (it has {held})", advice)
            if cells is None:
                return
            yield row


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text that are not empty, without blanks around them; raises `DataError`."""
    with _opened(path) as file:
        lines = Lines(file)
        try:
            yield from (line.strip() for line in lines if line.strip())
        except (OSError, ValueError) as error:
            raise DataError(
                f"Line {lines.number + 1} of {shown(path)} cannot be read ({_reason(error)}): correct it."
            ) from error


def read_captions(table: Path, caption: str = "caption") -> list[str]:
    """The first caption of every row of a table that has one, the others are counted in a warning; raises `DataError`
    without the column."""
    texts = [texts_in(row.cells.get(caption)) for row in read_rows(table, caption)]
    empty = sum(not found for found in texts)
    if empty:
        rank_zero_warn(f"{empty} of the {len(texts)} rows of {shown(table)} hold no {caption} and are left out.")
    return [found[0] for found in texts if found]


def texts_in(found: Any) -> tuple[str, ...]:
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


class Lines:
    """The lines of a text in UTF-8, counted, each with its end; raises `ValueError` for one that is none, or too long.

    Each is decoded by itself, so that it is known which one cannot be.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.number = file, 0

    def __iter__(self) -> Iterator[str]:
        while content := self.file.readline(NOTE):
            if len(content) == NOTE:
                raise ValueError(f"a line of more than {NOTE:,} bytes")
            text = content.decode("utf-8" if self.number else "utf-8-sig")
            for line in io.StringIO(text, newline=""):  # a lone carriage return ends one, too
                self.number += 1
                yield line


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read ({error.strerror or error}).") from error


def _csv(lines: Lines, separator: str) -> Iterator[dict[str, Any]]:
    rows = csv.reader(lines, delimiter=separator, strict=True)
    header = next((row for row in rows if row), [])
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise ValueError(f"two columns of one name: {', '.join(header)}")
    for row in rows:
        if any(row[len(header) :]):
            word = "tabulators" if separator == "\t" else "commas"
            raise ValueError(
                f"{len(row)} cells, and the first line has {len(header)}: a text with {word} must be in double quotes"
            )
        if row:
            yield dict.fromkeys(header) | dict(zip(header, row, strict=False))


def _jsonl(lines: Lines) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__} where an object belongs")
            yield row


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    own = type(error) is ValueError
    return shown(str(error) if own else f"{type(error).__name__}: {error}")[:200]
