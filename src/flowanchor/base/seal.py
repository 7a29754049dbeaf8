"""Sums that files of ours carry, so that a hole or a flipped bit is noticed before it is trained on or published.

A `.safetensors` file carries one in its metadata, a folder of files in `sums.json`; a file of `torch.save` is a zip,
which has a CRC-32 of every entry of its own.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from flowanchor.base.files import blocks, replacing, save_tensors, write_json

SEAL = "sha256"  # the name in the metadata
BLANK = "0" * 64  # what stands there while the digest is computed
SUMS = "sums.json"
_HEADER_LIMIT = 100_000_000  # bytes; that of safetensors


# -------------------------------------------------------------------------------------------------- one .safetensors


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`flowanchor.base.files.write_tensors`, with the file's digest in its metadata."""
    with replacing(path) as draft:
        save_tensors(draft, tensors, {**(metadata or {}), SEAL: BLANK})
        seal(draft)


def seal(path: Path) -> None:
    """Write the digest of a .safetensors file into its header, where `SEAL: BLANK` stands among the metadata."""
    place, digest = _digest(path)
    if place is None:
        raise ValueError(f"{path} has no place for a digest")
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def check_seal(path: Path) -> str | None:
    """What is wrong with a .safetensors file that carries a digest; None where nothing is, or where it carries none."""
    try:
        place, digest = _digest(path)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    if place is None:
        return None
    with path.open("rb") as file:
        file.seek(place)
        return None if file.read(64) == digest.encode() else "its content is not what was written"


def _digest(path: Path) -> tuple[int | None, str]:
    """Where the digest stands in the file, and that of the file with zeros in its place."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError("its header is damaged")
        header = file.read(length)
        try:
            stated = json.loads(header).get("__metadata__", {}).get(SEAL)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError("its header is damaged") from error
        if not isinstance(stated, str) or len(stated) != len(BLANK):
            return None, ""
        start = header.find(f'"{stated}"'.encode()) + 1
        found = hashlib.sha256(header[:start] + BLANK.encode() + header[start + len(BLANK) :])
        for block in blocks(file):
            found.update(block)
        return 8 + start, found.hexdigest()


# -------------------------------------------------------------------------------------------------- a folder of files


def sums_of(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of each file, by its name (a third of sha256's time, and as good against accidents)."""
    return {file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files}


def write_sums(folder: Path, sums: Mapping[str, Mapping[str, int]]) -> None:
    """Write what `sums_of` found, on all processes, into the folder."""
    write_json(folder / SUMS, dict(sums))


def check_folder(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a folder; None where nothing is, or where it has no sums (it was written before there were).

    `share` of `shares`: every so many-th file is read, so that several processes read a large folder together.
    """
    try:
        listed = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        wanted = {str(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return f"{SUMS} is damaged"
    for name, (size, crc) in sorted(wanted.items())[share::shares]:
        file = folder / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} is cut off"
        if _crc32(file) != crc:
            return f"{name} is not what was written"
    return None


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        for block in blocks(file):
            found = zlib.crc32(block, found)
    return found


# ------------------------------------------------------------------------------------------------- one of torch.save


def check_zip(path: Path) -> str | None:
    """What is wrong with a file of `torch.save` (its zip form); None where nothing is. Reads all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        return f"it is cut off or damaged: {error}"
    return None if damaged is None else f"its part {damaged} is not what was written"
