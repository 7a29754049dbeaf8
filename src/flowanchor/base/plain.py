"""Values that somebody else's file may hold: dictionaries with text keys, lists, texts, numbers, booleans and null.

What comes out of a checkpoint, a `config.json` or a manifest goes through `plain` before it is used: the result is a
copy that consists of these types alone, none of which has behaviour of its own, within bounds that no honest file
comes near. A text with `${`, which OmegaConf would turn into something else, is refused: a resolved configuration has
none.
"""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

from flowanchor.errors import CheckpointError, FlowAnchorError

DEPTH, ENTRIES, TEXT = 40, 1_000_000, 1_000_000  # levels, values in all, characters of one text
NUMBER = 10**40  # whole numbers; transformers writes 10^30 for no limit
FILE = 1 << 28  # bytes of a JSON file
_WORDS = {"dict": "a dictionary", "list": "a list", "str": "a text", "NoneType": "nothing"}


def plain(value: Any, source: object, error: type[FlowAnchorError] = CheckpointError) -> Any:
    """A copy of `value` in plain types; raises `error`, with the place within `source`, for anything else."""
    left = ENTRIES

    def copied(value: Any, place: tuple[Any, ...]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise error(f"{source} holds more than {ENTRIES:,} values: no file of flowanchor does, do not use it.")
        if len(place) > DEPTH:
            raise error(f"{source} is nested more than {DEPTH} levels deep: no file of flowanchor is, do not use it.")
        kind, fault = type(value), None
        if value is None or kind is bool:
            return value
        if kind is int:
            fault = None if abs(value) < NUMBER else "a whole number of forty digits and more"
        elif kind is float:
            fault = "not a number (NaN)" if math.isnan(value) else None
        elif kind is str:
            fault = _fault(value)
        elif kind is list:
            return [copied(inner, (*place, index)) for index, inner in enumerate(value)]
        elif kind is dict:
            for key in value:
                if type(key) is not str or _fault(key) is not None:
                    raise error(_sentence(source, place, f"a dictionary with the key {shown(key)}"))
            return {key: copied(inner, (*place, key)) for key, inner in value.items()}
        else:
            fault = described(value)
        if fault is not None:
            raise error(_sentence(source, place, fault))
        return value

    return copied(value, ())


def read_json(path: Path, error: type[FlowAnchorError] = CheckpointError) -> Any:
    """The content of a JSON file in plain types; raises `error` for one that is damaged, `OSError` for none."""
    if not path.is_file():  # a pipe would never end
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    with path.open("rb") as file:
        content = file.read(FILE + 1)
    if len(content) > FILE:
        raise error(f"{path} is larger than {FILE >> 20} MB: no file of flowanchor is, do not use it.")
    return parse_json(content, path, error)


def parse_json(content: bytes | str, source: object, error: type[FlowAnchorError] = CheckpointError) -> Any:
    """JSON in plain types; raises `error` for what is none, and for a key that stands twice in a dictionary."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands in it twice")
        return found

    try:
        text = content.decode() if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise error(f"{source} is nested more than {DEPTH} levels deep: no file of flowanchor is.") from None
    except ValueError as problem:  # of the syntax, of UTF-8, of a number with thousands of digits
        raise error(f"{source} is damaged ({problem}): copy, download or make it again.") from problem
    return plain(found, source, error)


def described(value: Any) -> str:
    """What a value is, in words."""
    return _WORDS.get(type(value).__name__, f"a {type(value).__name__}")


def bare(value: Any) -> str:
    """A value of a stranger's for a message: short, on one line, without control characters."""
    small = isinstance(value, float) or isinstance(value, int) and abs(value) < NUMBER
    text = value if isinstance(value, str) else repr(value) if small else described(value)
    text = "".join(c if c.isprintable() else "?" for c in text[:200])
    return text if len(text) <= 60 else text[:57] + "..."


def shown(value: Any) -> str:
    """The same in quotation marks."""
    return f"'{bare(value)}'"


def _fault(text: str) -> str | None:
    if len(text) > TEXT:
        return f"a text of {len(text):,} characters"
    if "${" in text:
        return f"the text {shown(text)}, which asks to be looked up elsewhere"
    if not text.isprintable() and any((c < " " and c not in "\n\r\t") or c == "\x7f" for c in text):
        return "a text with control characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a text that is no Unicode"
    return None


def _sentence(source: object, place: tuple[Any, ...], what: str) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    where = f" under {bare(where)}" if where else ""
    return f"{source} is refused{where}: there is {what}, and only plain values may stand there; do not use this file."
