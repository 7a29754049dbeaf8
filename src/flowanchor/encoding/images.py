"""Images of a source, decoded and cropped in parallel by workers of a data loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from flowanchor.base.reading import shown
from flowanchor.data.pictures import UNREADABLE, open_picture, reason_of
from flowanchor.encoding.crop import center_crop
from flowanchor.encoding.sources import Source


class ImageBatch(NamedTuple):
    """Images of one shard, in its order, and what could not be read among them."""

    images: Tensor  # uint8 [B, 3, S, S]
    indices: np.ndarray  # [B], of the source
    unreadable: list[str]  # "name: why"


class CroppedImages(Dataset[ImageBatch]):
    """Batches by the indices of their images; an image that cannot be read is named instead of being there."""

    def __init__(self, source: Source, size: int, batches: Sequence[np.ndarray]) -> None:
        self.source, self.size, self.batches = source, size, batches

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
        return pil_to_tensor(center_crop(open_picture(self.source.read(index), "RGB"), self.size))


def load_batches(source: Source, size: int, batches: Sequence[np.ndarray], num_workers: int) -> Iterator[ImageBatch]:
    """The batches in order."""
    dataset = CroppedImages(source, size, batches)
    return iter(DataLoader(dataset, batch_size=None, shuffle=False, num_workers=num_workers, collate_fn=_as_it_is))


def _as_it_is(batch: Any) -> Any:
    return batch
