"""Which plain attributes a step reads: a graph would go on using the values that they had when it was captured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowanchor.interfaces import Backbone

PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_FOREIGN = ("torch.", "builtins", "functools", "diffusers.", "transformers.", "peft.")


class Reads:
    """What was read of the objects below `roots`: numbers, words, and which tensors, by the path that leads there.

    Networks are left out unless they are roots: nobody tells them the step.
    """

    def __init__(self, *roots: Any) -> None:
        self._objects: dict[int, tuple[Any, str]] = {}
        self._seen: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for root in roots:
            self._walk(root, type(root).__name__, is_root=True)

    def _walk(self, thing: Any, path: str, is_root: bool = False) -> None:
        if isinstance(thing, Mapping):
            for key, value in thing.items():
                self._walk(value, f"{path}[{key!r}]")
        elif isinstance(thing, (list, tuple, set)):
            for index, value in enumerate(thing):
                self._walk(value, f"{path}[{index}]")
        elif id(thing) not in self._objects and (is_root or not isinstance(thing, Backbone)):
            if not _is_ours(thing) and not isinstance(thing, nn.Module):
                return
            self._objects[id(thing)] = thing, path
            for name, value in list(vars(thing).items()):
                if name == "_modules":
                    for key, child in value.items():
                        self._walk(child, f"{path}.{key}")
                elif name not in ("_parameters", "_buffers"):
                    self._walk(value, f"{path}.{name}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A region whose reads are noted."""
        classes = []
        try:
            for thing, path in self._objects.values():
                if not _is_ours(thing):
                    continue
                classes.append((thing, type(thing)))
                object.__setattr__(thing, "__class__", self._spy(type(thing), path))
            yield
        finally:
            for thing, cls in classes:
                object.__setattr__(thing, "__class__", cls)

    def _spy(self, cls: Any, path: str) -> type:
        seen = self._seen

        def read(self: Any, name: str) -> Any:
            value = cls.__getattribute__(self, name)
            if not name.startswith("__") and _is_comparable(value):
                seen.setdefault((id(self), name), (self, f"{path}.{name}", _kept(value)))
            return value

        return type(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})

    def changed(self) -> str | None:
        """The first of them that is no longer as it was, in words."""
        for (_, name), (thing, path, then) in self._seen.items():
            now = _kept(getattr(thing, name, None))
            if now != then:
                was = "another tensor" if isinstance(then, _Address) else f"{then!r} and is {now!r}"
                return f"{path} was {was}"
        return None


class _Address(tuple[Any, ...]):
    """Where a tensor lies."""


def _is_ours(thing: Any) -> bool:
    return hasattr(thing, "__dict__") and not isinstance(thing, (type, Tensor)) and not _is_foreign(type(thing))


def _is_foreign(cls: type) -> bool:
    return cls.__module__.startswith(_FOREIGN)


def _is_comparable(value: Any) -> bool:
    if isinstance(value, (PLAIN, Tensor)):
        return True
    if isinstance(value, Mapping):
        return all(isinstance(v, PLAIN) for v in value.values())
    return isinstance(value, Sequence) and all(isinstance(v, PLAIN) for v in value)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Address((value.data_ptr(), tuple(value.shape), value.dtype))
    return value if isinstance(value, PLAIN) else copy.copy(value)
