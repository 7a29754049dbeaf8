"""What generated images are compared with: the train split, a folder, or an .npz of images or statistics."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from torch import Tensor

from flowanchor.data.base import FlowDataModule
from flowanchor.errors import DataError
from flowanchor.metrics.reference_base import Reference, Shape
from flowanchor.metrics.reference_folder import ImageTree
from flowanchor.metrics.reference_npz import NpzReference


class TrainSplit(Reference):
    """The images that the network was trained on."""

    def __init__(self, data: FlowDataModule) -> None:
        self.name, self._data = f"{data.name}, train split", data
        self.shape = (data.channels, data.size, data.size)

    @cached_property
    def digest(self) -> str:
        return self._data.images("train").digest()

    @property
    def n(self) -> int:
        return len(self._data.images("train"))

    def chunks(self, batch_size: int) -> Iterator[Tensor]:
        images = self._data.images("train")
        for start in range(0, len(images), batch_size):
            yield images.stack(range(start, min(start + batch_size, len(images))))


def open_reference(path: str, shape: Shape, crop: bool = False, cache_dir: str | None = None) -> Reference:
    """The reference at a path, for images of this shape.

    Args:
        path: a folder of images (any tree), or an .npz: ADM's (`arr_0`, and/or `mu`, `sigma`, `mu_s`, `sigma_s`) or
            statistics alone (`mu`, `sigma`), as the authors' `fid-50k-256.npz`.
        shape: of the images that are evaluated.
        crop: cut a folder's images to the middle square of that size (ADM's crop) instead of refusing other sizes.
        cache_dir: where the hash of a folder is remembered while its files stay as they are.

    Raises:
        DataError: nothing there, no images, no known arrays, or images of another size.
    """
    location = Path(path).expanduser()
    if location.is_dir():
        return ImageTree(location, shape, crop, cache_dir)
    if not location.is_file():
        raise DataError(f"There is no reference {location}: give a folder of images or an .npz file by reference=PATH.")
    return NpzReference(location, shape)
