"""The header of a `.npy` array: what it says is held against what is there before anything is made of it."""

from __future__ import annotations

import io
import math
from typing import IO, Any

import numpy as np

LONGEST = 10_000  # bytes of a header, NumPy's own limit

Header = tuple[tuple[int, ...], np.dtype[Any]]


def read_header(file: IO[bytes], kinds: str = "f") -> Header:
    """Shape and type of an array; the file is left where its values begin.

    Args:
        kinds: the kinds of types that are taken, by NumPy's letters (`f`: floating point, `iu`: whole numbers).

    Raises:
        ValueError: no header, or that of an array of another kind, of objects, stored by columns, or of no such shape.
    """
    start = file.read(8)
    width = 2 if start[6:7] == b"\x01" else 4
    start += file.read(width)
    length = int.from_bytes(start[8:], "little")
    if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\x01", b"\x02", b"\x03") or length > LONGEST:
        raise ValueError("it is no .npy array")
    whole = io.BytesIO(start + file.read(length))
    np.lib.format.read_magic(whole)
    read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(whole)
    except Exception as error:  # it is parsed as Python's source, and a text can be made to break that in many ways
        raise ValueError(f"the header of its array cannot be read ({type(error).__name__})") from error
    if dtype.kind not in kinds or dtype.hasobject:
        wanted = "floating-point" if kinds == "f" else "plain"
        raise ValueError(f"its array holds {str(dtype)[:60]}, not {wanted} numbers")
    if fortran and len(shape) > 1:
        raise ValueError("its values are stored by columns")
    if len(shape) > 8 or not all(0 <= side < 1 << 48 for side in shape):
        raise ValueError("its array has a shape that no file could hold")
    return shape, dtype


def byte_count(header: Header) -> int:
    """Bytes of an array's values; the sides of a shape are without bounds, and so is this."""
    return math.prod(header[0]) * header[1].itemsize
