"""Files of unknown origin: only regular ones are opened, no more is read than was asked for, names can be printed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

LONGEST = 400  # letters of a name in a message


def open_regular(path: Path | str) -> BinaryIO:
    """A file for reading; raises `OSError` for what is none: a folder, a pipe that would be waited on, a device."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a name with a zero byte, or that no file system could hold
        raise OSError(f"{shown(path)} is no name of a file") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{shown(path)} is no regular file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path | str, most: int, offset: int = 0, count: int | None = None) -> bytes:
    """`count` bytes from `offset` on, or all; raises `OSError` for more than `most` bytes, before any is read."""
    with open_regular(path) as file:
        there = max(0, os.fstat(file.fileno()).st_size - offset)
        wanted = there if count is None else min(count, there)
        if wanted > most:
            raise OSError(f"{wanted / 1e9:.1f} GB are too much: at most {most / 1e9:.1f} GB are read")
        file.seek(offset)
        return file.read(wanted)


def shown(name: object) -> str:
    """A name or text of a stranger for a message: what cannot be printed (bytes that are no UTF-8, control characters,
    which a terminal would obey) is escaped, and the middle of what has hundreds of letters left out."""
    text = str(name)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 4 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
