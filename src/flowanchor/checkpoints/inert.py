"""Reading foreign `.pt` files: tensors as they are, the few other things that releases hold as inert data.

PyTorch's restricted unpickler refuses every name that it does not know. Released training checkpoints also name
`argparse.Namespace`, containers of OmegaConf and numbers of numpy: each such name stands here for `Inert`, which only
keeps what it is given, so that no code of a file's choice runs. Any other name is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flowanchor.base.torch_files import read_torch
from flowanchor.errors import CheckpointError


class Inert:
    """What stood under an allowed name: the state that the file gives it, and no behaviour."""

    state: Any = None

    def __init__(self, *values: Any) -> None:
        """Takes whatever a constructor of that name would."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain_dictionary(*values: Any) -> dict[Any, Any]:
    return {}  # the file fills it with its entries


_INERT = (
    "argparse.Namespace",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")),
    "typing.Any",
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Int32", "UInt32")),
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
)
_ALLOWED: list[Any] = [*((Inert, name) for name in _INERT), (_plain_dictionary, "collections.defaultdict")]


def read_inert(path: Path) -> Any:
    """The content of a `.pt`, `.pth`, `.ckpt` or `.safetensors` file, without running anything in it.

    Tensors of the zip format are mapped from the file. Raises `CheckpointError` for a file that is damaged, or that
    names anything but tensors and plain data.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_ALLOWED):
            return read_torch(path, mmap=zipfile.is_zipfile(path), legacy=True)
    except pickle.UnpicklingError as error:
        named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
        raise CheckpointError(
            f"{path} is refused: reading it would run code, or it is no file of torch.save "
            f"({' '.join(named)[:160] or 'unreadable'}). Ask its author for a .safetensors file or a bare state dict."
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # damaged files make PyTorch raise almost anything
        raise CheckpointError(
            f"{path} is damaged or cut off ({type(error).__name__}): copy or download it again."
        ) from error


def plain(value: Any) -> Any:
    """What inert data hold as plain values: a namespace or a container of OmegaConf as a dictionary or list."""
    if isinstance(value, Inert):
        state = value.state
        if isinstance(state, dict) and "_content" in state:  # a container of OmegaConf
            return plain(state["_content"])
        if isinstance(state, dict) and "_val" in state:  # a leaf of OmegaConf
            return plain(state["_val"])
        return plain(state) if isinstance(state, dict) else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value
