"""Files and folders that are there as a whole or not at all.

Everything that flowanchor writes is written beside its target, on the same file system, flushed to the disk, and moved
into its place in one move: nobody reads half of it, and what lay there before stays until the new one is complete.

    with replacing(path) as draft:      # a file, by any writer
        picture.save(draft, format="PNG")
    write_whole(path, text)             # bytes, text, arrays
    write_tensors(path, tensors)        # .safetensors
    read_note(path)                     # a JSON object, or None
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flowanchor.base.alive import is_alive

PARTIAL, PREVIOUS = ".partial", ".previous"


def unfinished(path: Path) -> Path:
    """Where the next content of `path` is written before it takes its place."""
    return path.with_name(f"{path.name}{PARTIAL}")


def superseded(path: Path) -> Path:
    """Where the content of `path` goes that the next one has replaced, if it is kept (`replace`)."""
    return path.with_name(f"{path.name}{PREVIOUS}")


@contextmanager
def replacing(path: Path, *, shared: bool = False, keep_previous: bool = False) -> Iterator[Path]:
    """Yield a path to write a file to; at the end of the block it takes the place of `path`, with the umask's rights.

    An error inside the block leaves `path` as it was and nothing beside it.

    Args:
        shared: several programs may write this target at once (a cache): each has a draft of its own.
        keep_previous: what was there before stays as `superseded(path)`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _own_draft(path) if shared else unfinished(path)
    try:
        remove(draft)
        draft.touch()
        rights = draft.stat().st_mode & 0o777  # those of the umask; safetensors would make it 600
        yield draft
        os.chmod(draft, rights)
        flush(draft)
        replace(draft, path, keep_previous)
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise


def write_whole(
    path: Path, content: bytes | str | Mapping[str, np.ndarray], *, shared: bool = False, keep_previous: bool = False
) -> None:
    """Write bytes, text (UTF-8), or arrays as an .npz; raises `OSError` where that is impossible."""
    with replacing(path, shared=shared, keep_previous=keep_previous) as draft, draft.open("wb") as file:
        if isinstance(content, str):
            file.write(content.encode(errors="backslashreplace"))  # names of files may hold what is no Unicode
        elif isinstance(content, bytes):
            file.write(content)
        else:
            np.savez(file, **content)  # type: ignore[arg-type]


def write_json(path: Path, content: Any, *, shared: bool = False) -> None:
    """Write plain values as indented JSON."""
    write_whole(path, json.dumps(content, indent=2) + "\n", shared=shared)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, shared: bool = False
) -> None:
    """Write a .safetensors file; raises `OSError` where that is impossible."""
    with replacing(path, shared=shared) as draft:
        save_tensors(draft, tensors, metadata)


def save_tensors(draft: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors' own writer, into a draft; what its disk refuses is an `OSError`."""
    try:
        save_file(dict(tensors), draft, metadata=metadata)
    except SafetensorError as error:
        raise OSError(_number(str(error)), str(error), str(draft)) from error


def save_torch(draft: Path, content: Any) -> None:
    """`torch.save` into a draft; what its disk refuses is an `OSError`, and no `RuntimeError` about a position."""
    try:
        with draft.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(draft)) from error


def replace(draft: Path, path: Path, keep_previous: bool = False) -> None:
    """Move a complete file or folder into the place of `path`; one of new and old is there at every moment.

    A file replaces a file in one move. A folder, or what is to be kept, is moved aside first: a reader that finds
    nothing at `path` looks at `superseded(path)`.
    """
    plain = not keep_previous and not draft.is_dir() and not path.is_dir()
    if plain:
        os.replace(draft, path)
    else:
        old = superseded(path)
        if os.path.lexists(path):
            remove(old)
            path.rename(old)
        draft.rename(path)
        if not keep_previous:
            remove(old)
    _flush_entry(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder with all its files."""
    if path.is_dir():
        for inner in path.iterdir():
            flush(inner)
        _flush_entry(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_entry(folder: Path) -> None:
    """Have the disk hold a folder's list of names, where its file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_note(path: Path) -> dict[str, Any] | None:
    """A JSON object of ours; None where it is not there or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def sha256(path: Path) -> str:
    """sha256 of a file's content, hex."""
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def add_file(digest: Any, path: Path) -> None:
    """Add a file's content to a digest (of hashlib), block by block."""
    with path.open("rb") as file:
        for block in blocks(file):
            digest.update(block)


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """What is left of an open file, in pieces that fit into memory."""
    while block := file.read(1 << 20):
        yield block


def _own_draft(path: Path) -> Path:
    """A draft of this process alone; drafts of processes of this machine that have died are removed."""
    host = socket.gethostname()
    for old in path.parent.glob(f"{path.name}.{host}.*{PARTIAL}"):
        process = old.name.removesuffix(PARTIAL).rpartition(".")[2]
        if process.isdigit() and not is_alive(int(process)):
            with suppress(OSError):
                old.unlink()
    return path.with_name(f"{path.name}.{host}.{os.getpid()}{PARTIAL}")


def _number(text: str) -> int:
    """The system's number of an error that safetensors tells in words: `Os { code: 28, ... }`."""
    code = text.partition("code: ")[2].partition(",")[0]
    return int(code) if code.isdigit() else 5  # EIO
