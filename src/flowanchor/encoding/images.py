"""Images of a source, decoded and cropped in parallel by workers of a data loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from flowanchor.base.reading import shown
from flowanchor.data.pictures import UNREADABLE, open_picture, reason_of
from flowanchor.data.workers import in_order
from flowanchor.encoding.crop import center_crop
from flowanchor.encoding.sources import Source


class ImageBatch(NamedTuple):
    """Images of one shard, in its order, and what could not be read among them."""

    images: Tensor  # uint8 [B, 3, S, S]
    indices: np.ndarray  # [B], of the source
    unreadable: list[str]  # "name: why"


class CroppedImages(Dataset[ImageBatch]):
    """Batches by the indices of their images; an image that cannot be read is named instead of being there."""

    def __init__(self, source: Source, size: int, batches: Sequence[np.ndarray], upright: bool = True) -> None:
        self.source, self.size, self.batches, self.upright = source, size, batches, upright

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> ImageBatch:
        images, indices, unreadable = [], [], []
        for index in self.batches[number].tolist():
            try:
                images.append(self._image(index))
                indices.append(index)
            except UNREADABLE as error:
                unreadable.append(f"{shown(self.source.names[index])}: {reason_of(error)}")
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return ImageBatch(stacked, np.asarray(indices, dtype=np.int64), unreadable)

    def _image(self, index: int) -> Tensor:
        image = open_picture(self.source.read(index), "RGB", upright=self.upright)
        return pil_to_tensor(center_crop(image, self.size))


def load_batches(
    source: Source, size: int, batches: Sequence[np.ndarray], num_workers: int, upright: bool = True
) -> Iterator[ImageBatch]:
    """The batches in order."""
    return in_order(CroppedImages(source, size, batches, upright), num_workers)
