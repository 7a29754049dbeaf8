"""What is inside a nested value: its tensors, and its leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


def tensors_inside(value: Any, way: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value, with the way to it (`[0]`, `['time']`, `.scale`): containers, attributes of objects and
    dataclasses, what functions close over. Modules are left out: what they hold is theirs.

    `torch.utils._pytree` would take a dataclass, an object or a function for a leaf, and see nothing in it.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield way, value
    elif id(value) not in seen:
        seen.add(id(value))
        for step, part in _parts(value):
            yield from tensors_inside(part, way + step, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (str, bytes, type, nn.Module, ModuleType)):
        return
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", part) for name, part in zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f" (its {name})", cell.cell_contents
            except ValueError:  # a name that has no value yet
                continue
        yield " (its defaults)", (value.__defaults__, value.__kwdefaults__)
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, partial):
        yield " (its arguments)", (value.args, value.keywords)
    else:
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
        slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
        yield from ((f".{name}", getattr(value, name)) for name in slots if hasattr(value, name))


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A value with each leaf of its tuples, lists and dicts replaced, in the order of `tree_leaves`."""
    # A tuple of leaves is what is nearly always met, and several times in a stage.
    if type(value) is tuple and not any(isinstance(part, (tuple, list, dict)) for part in value):
        return tuple(map(function, value))
    return tree_map(function, value)
