"""Sets of images in uint8: what data modules hold, and what evaluation compares with."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowanchor.base.pixels import from_uint8
from flowanchor.interfaces import Batch


class ImageSet(Dataset[Tensor], ABC):
    """A fixed set of images; items are uint8 tensors [C, H, W].

    Attributes:
        labels: class of each image, int64 [N], or None where the set has none.
    """

    labels: np.ndarray | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor: ...

    @abstractmethod
    def digest(self) -> str:
        """A hash of the images and labels: equal for equal content, wherever it is stored."""

    def stack(self, indices: Sequence[int]) -> Tensor:
        """Several images at once, uint8 [B, C, H, W]."""
        return torch.stack([self[i] for i in indices])

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The images with these indices, in this order."""
        return _Subset(self, np.asarray(indices, dtype=np.int64))


class ArrayImages(ImageSet):
    """Images that fit into memory."""

    def __init__(self, images: Tensor, labels: np.ndarray | None) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], not {images.dtype} {tuple(images.shape)}")
        self._images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]

    def stack(self, indices: Sequence[int]) -> Tensor:
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]

    def digest(self) -> str:
        content = hashlib.sha256(repr(tuple(self._images.shape)).encode())
        content.update(np.ascontiguousarray(self._images.numpy()).data)
        content.update(b"" if self.labels is None else np.ascontiguousarray(self.labels).data)
        return content.hexdigest()


class _Subset(ImageSet):
    def __init__(self, images: ImageSet, indices: np.ndarray) -> None:
        self._images, self._indices = images, indices
        self.labels = None if images.labels is None else images.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[int(self._indices[index])]

    def stack(self, indices: Sequence[int]) -> Tensor:
        return self._images.stack(self._indices[np.asarray(indices, dtype=np.int64)].tolist())

    def digest(self) -> str:
        return hashlib.sha256(self._images.digest().encode() + self._indices.tobytes()).hexdigest()


class ImageBatches(Dataset):
    """An `ImageSet` as training examples: a list of indices gives a whole `Batch`, so that nothing is left to collate.

    Args:
        images: the set.
        labelled: whether `Batch.cond` holds the labels.
        mirror: doubles the set by mirrored copies: index `i + N` is image `i`, flipped left to right.
    """

    def __init__(self, images: ImageSet, labelled: bool, mirror: bool = False) -> None:
        self.images = images
        self.labels = torch.as_tensor(images.labels, dtype=torch.int64) if labelled else None
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.images) * (2 if self.mirror else 1)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:  # what `DataLoader` calls with the indices of a batch
        count = len(self.images)
        source = [i % count for i in indices]
        pixels = from_uint8(self.images.stack(source))  # [B, C, H, W]
        flipped = torch.tensor([i >= count for i in indices])
        if flipped.any():
            pixels[flipped] = pixels[flipped].flip(-1)
        return Batch(pixels, None if self.labels is None else self.labels[source])


def interleave_classes(labels: np.ndarray) -> np.ndarray:
    """An order [N] of the samples whose every prefix is as balanced over the classes as they allow."""
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.lexsort((labels, turn))


def split_heldout(
    labels: np.ndarray | None, length: int, per_class: Sequence[int] | int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the train and of the held-out samples, by a fixed seeded draw within each class.

    `per_class` is the number of held-out samples of every class (in the order of the sorted labels), or of the whole
    set where there are no labels. The held-out indices are interleaved by class.
    """
    groups = np.zeros(length, dtype=np.int64) if labels is None else labels
    classes = np.unique(groups)
    counts = [per_class] * len(classes) if isinstance(per_class, int) else list(per_class)
    rng = np.random.default_rng(seed)
    drawn = [
        rng.permutation(np.flatnonzero(groups == label))[:count] for label, count in zip(classes, counts, strict=True)
    ]
    heldout = np.concatenate(drawn)
    train = np.setdiff1d(np.arange(length), heldout)
    return train, heldout[interleave_classes(groups[heldout])]
