"""Images of a source, decoded and cropped in parallel by workers of a data loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from flowanchor.base.reading import shown
from flowanchor.data.pictures import UNREADABLE, open_picture, reason_of
from flowanchor.encoding.buckets import Size
from flowanchor.encoding.sources import Source

Crop = Callable[[Image.Image, Size], Image.Image]


class ImageBatch(NamedTuple):
    """Images of one file, in its order, and what could not be read among them."""

    images: Tensor  # uint8 [B, 3, H, W]
    indices: np.ndarray  # [B], of the source
    unreadable: list[str]  # "name: why"


class CroppedImages(Dataset[ImageBatch]):
    """Batches of one size each, by the indices of their images; one that cannot be read is named instead."""

    def __init__(
        self, source: Source, crop: Crop, batches: Sequence[tuple[Size, np.ndarray]], upright: bool = True
    ) -> None:
        self.source, self.crop, self.batches, self.upright = source, crop, batches, upright

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> ImageBatch:
        size, wanted = self.batches[number]
        images, indices, unreadable = [], [], []
        for index in wanted.tolist():
            try:
                image = open_picture(self.source.read(index), "RGB", upright=self.upright)
                images.append(pil_to_tensor(self.crop(image, size)))
                indices.append(index)
            except UNREADABLE as error:
                unreadable.append(f"{shown(self.source.names[index])}: {reason_of(error)}")
        stacked = torch.stack(images) if images else torch.empty(0, 3, *size, dtype=torch.uint8)
        return ImageBatch(stacked, np.asarray(indices, dtype=np.int64), unreadable)
