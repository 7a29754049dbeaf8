"""Weights by name, wherever they lie, and the part of a tensor that this process owns.

Weights are a `Mapping[str, Tensor]`: a dictionary of (memory-mapped) tensors, or the tensors of a sharded checkpoint,
which are read when they are asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flowanchor.base.plain import bare, described, shown
from flowanchor.base.shards import is_shared
from flowanchor.errors import CheckpointError


class LazyWeights(Mapping[str, Tensor]):
    """Weights that are read from their file on demand; `copy_into` reads no more than the targets hold."""

    def shape(self, name: str) -> torch.Size:
        """Shape of an entry, without reading it."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """Type of an entry's numbers."""
        return self[name].dtype

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or sharded, with the entries of their names."""
        raise NotImplementedError


class View(LazyWeights):
    """Entries of other weights, each found under a name of its own; a subclass says where, and lists the names."""

    def _find(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        """The weights that hold an entry, and its name there; raises `KeyError` where none can."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        weights, theirs = self._find(name)
        return weights[theirs]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        try:
            weights, theirs = self._find(name)
        except KeyError:
            return False
        return theirs in weights

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shape(self, name: str) -> torch.Size:
        return shape_of(*self._find(name))

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(*self._find(name))

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        found: dict[int, tuple[Mapping[str, Tensor], dict[str, Tensor]]] = {}
        for name, tensor in targets.items():
            weights, theirs = self._find(name)
            own = found.setdefault(id(weights), (weights, {}))[1]
            if theirs in own:  # the same entry under two names
                copy_weights(weights, {theirs: tensor})
            else:
                own[theirs] = tensor
        for weights, own in found.values():
            copy_weights(weights, own)


class Renamed(View):
    """The entries of other weights under shorter names: `prefix + name` there is `name` here."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def _find(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        return self.weights, self.prefix + name

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.weights if name.startswith(self.prefix))


class Joined(View):
    """The entries of several networks in one: `prefix + name`."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.parts = dict(parts)

    def _find(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        for prefix, weights in self.parts.items():
            if name.startswith(prefix):
                return weights, name.removeprefix(prefix)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (prefix + name for prefix, weights in self.parts.items() for name in weights)


class Copied(View):
    """The entries of other weights, and copies of some of them under further names: name here -> name there."""

    def __init__(self, weights: Mapping[str, Tensor], copies: Mapping[str, str]) -> None:
        self.weights, self.copies = weights, dict(copies)

    def _find(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        return self.weights, name if name in self.weights else self.copies.get(name, name)

    def __iter__(self) -> Iterator[str]:
        yield from self.weights
        yield from (name for name, of in self.copies.items() if name not in self.weights and of in self.weights)


class Overlaid(View):
    """The entries of `above`, and of `below` those that it lacks."""

    def __init__(self, above: Mapping[str, Tensor], below: Mapping[str, Tensor]) -> None:
        self.above, self.below = above, below

    def _find(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        return (self.above if name in self.above else self.below), name

    def __iter__(self) -> Iterator[str]:
        yield from self.above
        yield from (name for name in self.below if name not in self.above)


def shape_of(weights: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of an entry, without reading it where that can be avoided."""
    return weights.shape(name) if isinstance(weights, LazyWeights) else weights[name].shape


def dtype_of(weights: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Type of an entry's numbers, without reading it where that can be avoided."""
    return weights.dtype(name) if isinstance(weights, LazyWeights) else weights[name].dtype


def kind_of(dtype: torch.dtype) -> str:
    """What a type is for: weights are floating-point numbers, counters and tables may be something else."""
    quantised = dtype in (torch.qint8, torch.quint8, torch.qint32)
    kinds = {"floating": dtype.is_floating_point, "complex": dtype.is_complex, "quantised": quantised}
    return next((kind for kind, holds in kinds.items() if holds), "truth" if dtype == torch.bool else "whole")


def checked_weights(weights: Any, source: object) -> Mapping[str, Tensor]:
    """Weights out of a file, by name: whole tensors, each with numbers of its own; raises `CheckpointError`."""
    if isinstance(weights, LazyWeights):
        return weights
    if not isinstance(weights, dict):
        raise CheckpointError(f"{source} holds {described(weights)} in place of weights: do not use this file.")
    found = dict(dict.items(weights))  # an ordered dictionary out of a file may say anything about itself
    for name, tensor in found.items():
        if not isinstance(name, str) or not name.isprintable():
            raise CheckpointError(f"{source} holds a weight whose name is {shown(name)}: do not use this file.")
        whole_tensor(tensor, f"{source}: {bare(name)}")
    return found


def whole_tensor(tensor: Any, source: object) -> Tensor:
    """A tensor out of a file as it is; raises `CheckpointError` unless it is a whole one that the file really holds."""
    fault = None
    if not isinstance(tensor, Tensor):
        fault = f"is {described(tensor)} and no tensor"
    elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        fault = "is sparse, quantised or has no values"
    elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        fault = "is larger than what the file holds of it"
    if fault is not None:
        raise CheckpointError(f"{source} cannot be used as a weight (it {fault}): do not use this file.")
    found: Tensor = tensor
    return found


@torch.no_grad()
def check_finite(weights: Mapping[str, Tensor], source: object, names: Iterable[str] | None = None) -> None:
    """Raise `CheckpointError` where weights (all, or those of `names`) are not numbers any more.

    Those without values are not looked at.
    """
    looked_at = list(weights if names is None else names)
    broken = [name for name in looked_at if not _is_finite(local(weights[name]))]
    if broken:
        raise CheckpointError(
            f"{source} holds weights that are not finite ({len(broken)} of {len(looked_at)} tensors, such as "
            f"{bare(broken[0])}): the run has diverged; use an earlier checkpoint, or another ema_profile."
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    numbers = tensor.float() if tensor.element_size() == 1 else tensor  # of eight bits, which know no comparisons
    return bool(torch.stack(torch.aminmax(numbers)).isfinite().all())


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; of sharded ones this process' part is looked at.

    One answer is awaited per device and type, not one per tensor.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(local, tensors):
        if is_traceable_wrapper_subclass(tensor):
            continue  # quantised: finite when it was read, and trained by nobody
        if tensor.numel() and tensor.is_floating_point():
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    largest = [torch.stack(torch._foreach_norm(kind, float("inf"))) for kind in kinds.values()]
    return all(bool(torch.isfinite(found).all()) for found in largest)


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place with the weights of their names; of a sharded one, only this process' part is copied."""
    if isinstance(weights, LazyWeights):
        weights.copy_into(targets)
        return
    for name, target in targets.items():
        local(target).copy_(weights[name][own_part(target)])


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor, sharing its storage (call under `no_grad`)."""
    return tensor.to_local() if is_shared(tensor) else tensor


def own_part(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this process holds, as an index."""
    start, length = [0] * tensor.ndim, list(tensor.shape)
    if is_shared(tensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, sys.modules["torch.distributed.tensor"].Shard):  # the others are replicas
                share = -(-length[placement.dim] // tensor.device_mesh.size(axis))
                begin = min(share * tensor.device_mesh.get_local_rank(axis), length[placement.dim])
                start[placement.dim] += begin
                length[placement.dim] = min(share, length[placement.dim] - begin)
    return tuple(slice(begin, begin + size) for begin, size in zip(start, length, strict=True))
