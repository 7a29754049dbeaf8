"""A pickle of plain values and arrays of bytes, as CIFAR-10's authors published theirs, read without running it."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from flowanchor.base.reading import shown


def load_arrays(content: bytes) -> dict[Any, Any]:
    """A dict of plain values and of arrays of unsigned bytes; raises `ValueError` for anything else.

    Nothing of NumPy is made by the file: the names that such pickles ask for stand for `_Array` and `_Type`.
    """
    try:
        _check_memo(content)
        found = _Reader(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not a dict")
    return {key: value.values() if isinstance(value, _Array) else value for key, value in found.items()}


def _check_memo(content: bytes) -> None:
    """Raise `ValueError` where the file is cut off or counts its objects wrongly: the reader makes room for as many."""
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if "PUT" in operation.name and isinstance(argument, int) and argument > number:
            raise ValueError(f"it speaks of {argument:,} objects and holds {number:,}")


class _Type:
    """`numpy.dtype`: of unsigned bytes."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise ValueError(f"an array of {str(code)[:20]}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which bytes have none of."""


class _Array:
    """`numpy.ndarray`, filled by `__setstate__`."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, tuple) else ()

    def values(self) -> np.ndarray:
        if len(self.state) != 5:
            raise ValueError("an array without its values")
        _, shape, dtype, by_columns, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content
        if not (isinstance(dtype, _Type) and isinstance(content, bytes) and isinstance(shape, tuple)) or by_columns:
            raise ValueError("an array that is none of bytes, by rows")
        bounded = len(shape) <= 4 and all(type(side) is int and 0 <= side <= len(content) for side in shape)
        if not bounded or math.prod(shape) != len(content):
            raise ValueError(f"an array of another shape than its {len(content):,} bytes")
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _encode(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`: bytes, as later versions of Python pickle them."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise ValueError("bytes in another encoding than latin1")
    return text.encode("latin1")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if asked == "numpy.core.multiarray._reconstruct":
            return lambda *_: _Array()
        known = {"numpy.ndarray": _Array, "numpy.dtype": _Type, "_codecs.encode": lambda *given: _encode(*given)}
        if asked not in known:
            raise pickle.UnpicklingError(f"it asks for {shown(asked)}, which no file of CIFAR-10 holds")
        return known[asked]
