"""Bytes of the tensors that operators make, on any device and for tensors without values as well."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESIZING = ("fsdp", "c10d")  # namespaces of operators around which storages change their sizes


class LiveBytes(TorchDispatchMode):
    """Within it, bytes of all storages that operators made and that are alive: now (`live`), at most (`peak`).

    A dispatch mode works below autograd, so that it sees tangents, what graphs keep and what backward passes make; and
    it works on the meta device, where nothing is computed and any size can be counted. It does not see what a kernel
    needs for itself while it runs. Storages that existed before count nothing.

    FSDP2 frees and fills the storages of whole parameters in place, so after each operator of its own, and after each
    collective, the sizes of all storages are looked at again. Storages that an earlier step left empty count nothing
    when they are filled again: count the first step of a sharded network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # storage -> bytes; 0 for those that existed before
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for tensor in tensors_of((args, kwargs)):
            self._add(tensor, existed=True)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_of(out):
            self._add(tensor, existed=False)
        if func.namespace in RESIZING:
            self._look_again()
        self.peak = max(self.peak, self.live)
        self._after()
        return out

    def _after(self) -> None:
        """Called after each operator."""

    def _add(self, tensor: Tensor, existed: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = 0
        if not existed:
            self._storages[key] = weakref.ref(storage)
            self._resize(key, storage.nbytes())
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._resize(key, 0)
        del self._sizes[key]
        self._storages.pop(key, None)

    def _resize(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size

    def _look_again(self) -> None:
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is not None:
                self._resize(key, storage.nbytes())


def tensors_of(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and not leaf._is_zerotensor() and leaf.layout == torch.strided:
            yield leaf
