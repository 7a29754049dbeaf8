"""Reading files of `torch.save`: tensors and plain values, and nothing that runs."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_torch(path: Path, mmap: bool = True, legacy: bool = False) -> Any:
    """The content of a file, its tensors on the CPU, mapped from the file where `mmap`.

    What else a file may name is refused by PyTorch's restricted unpickler. A damaged file makes PyTorch raise almost
    anything. `ValueError` for a compressed archive, which could be a thousand times larger than its file, for a tar,
    and for what older versions of PyTorch wrote, unless `legacy`.
    """
    if not path.is_file():  # a pipe would never end
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # by which PyTorch knows it
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its archive is compressed, which torch.save does not do")
    elif not legacy or _is_tar(path):  # a tar of PyTorch 0.1 is unpacked on the disk before anything is refused
        raise ValueError("it is no zip archive, which torch.save writes")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _is_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except (tarfile.TarError, ValueError, EOFError):
        return False
    return True
