"""Weights by name, wherever they lie, and the part of a tensor that this process owns.

Weights are a `Mapping[str, Tensor]`: a dictionary of (memory-mapped) tensors, or the tensors of a sharded checkpoint,
which are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


class LazyWeights(Mapping[str, Tensor]):
    """Weights that are read from their file on demand; `copy_into` reads no more than the targets hold."""

    def shape(self, name: str) -> torch.Size:
        """Shape of an entry, without reading it."""
        raise NotImplementedError

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or sharded, with the entries of their names."""
        raise NotImplementedError


class Renamed(LazyWeights):
    """The entries of other weights under shorter names: `prefix + name` there is `name` here."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.weights if name.startswith(self.prefix))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.prefix + name in self.weights

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shape(self, name: str) -> torch.Size:
        return shape_of(self.weights, self.prefix + name)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        copy_weights(self.weights, {self.prefix + name: tensor for name, tensor in targets.items()})


class Joined(LazyWeights):
    """The entries of several networks in one: `prefix + name`."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.parts = dict(parts)

    def _find(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        for prefix, weights in self.parts.items():
            if name.startswith(prefix):
                return weights, name.removeprefix(prefix)
        raise KeyError(name)

    def __getitem__(self, name: str) -> Tensor:
        weights, inner = self._find(name)
        return weights[inner]

    def __iter__(self) -> Iterator[str]:
        return (prefix + name for prefix, weights in self.parts.items() for name in weights)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(
            name.startswith(prefix) and name.removeprefix(prefix) in weights for prefix, weights in self.parts.items()
        )

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def shape(self, name: str) -> torch.Size:
        weights, inner = self._find(name)
        return shape_of(weights, inner)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        for prefix, weights in self.parts.items():
            own = {name.removeprefix(prefix): tensor for name, tensor in targets.items() if name.startswith(prefix)}
            copy_weights(weights, own)


class Overlaid(LazyWeights):
    """The entries of `above`, and of `below` those that it lacks."""

    def __init__(self, above: Mapping[str, Tensor], below: Mapping[str, Tensor]) -> None:
        self.above, self.below = above, below

    def _of(self, name: str) -> Mapping[str, Tensor]:
        return self.above if name in self.above else self.below

    def __getitem__(self, name: str) -> Tensor:
        return self._of(name)[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.above
        yield from (name for name in self.below if name not in self.above)

    def __contains__(self, name: object) -> bool:
        return name in self.above or name in self.below

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shape(self, name: str) -> torch.Size:
        return shape_of(self._of(name), name)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        copy_weights(self.above, {name: t for name, t in targets.items() if name in self.above})
        copy_weights(self.below, {name: t for name, t in targets.items() if name not in self.above})


def shape_of(weights: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of an entry, without reading it where that can be avoided."""
    return weights.shape(name) if isinstance(weights, LazyWeights) else weights[name].shape


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; of sharded ones this process' part is looked at.

    One answer is awaited per device and type, not one per tensor.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(local, tensors):
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
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this process holds, as an index."""
    start, length = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):  # the others are replicas
                share = -(-length[placement.dim] // tensor.device_mesh.size(axis))
                begin = min(share * tensor.device_mesh.get_local_rank(axis), length[placement.dim])
                start[placement.dim] += begin
                length[placement.dim] = min(share, length[placement.dim] - begin)
    return tuple(slice(begin, begin + size) for begin, size in zip(start, length, strict=True))
