"""Whether two things are set up alike, though they are two: for what is made once for all of them."""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class _Same:
    """Compares by identity, and keeps its object alive so that no other one gets its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


def comparable(value: Any, depth: int = 4) -> Any:
    """A value in a form that can be compared; functions, tensors and what is nested deeper compare by identity."""
    if isinstance(value, PLAIN):
        return type(value), value
    if depth == 0 or isinstance(value, (Tensor, nn.Module, FunctionType, MethodType, type)):
        return _Same(value)
    if isinstance(value, dict):
        return dict, tuple((comparable(key, depth - 1), comparable(part, depth - 1)) for key, part in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), tuple(comparable(part, depth - 1) for part in value)
    if hasattr(value, "__dict__"):
        return type(value), comparable(vars(value), depth - 1)
    return _Same(value)
