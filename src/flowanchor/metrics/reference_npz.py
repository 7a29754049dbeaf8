"""An .npz file as the reference: ADM's batches of images and statistics, or statistics alone."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from flowanchor.errors import DataError
from flowanchor.metrics.frechet import Gaussian
from flowanchor.metrics.reference import Reference, Shape
from flowanchor.metrics.storage import DAMAGED

IMAGES = "arr_0"  # uint8 [N, H, W, C]
KNOWN = "arr_0 (images, uint8 [N, H, W, C]), or mu and sigma (statistics), as in ADM's reference batches"


class NpzReference(Reference):
    """`arr_0` are images, `mu` and `sigma` statistics of Inception's pooled features, `mu_s` and `sigma_s` of its
    spatial ones. Images are read in pieces: a file of 10,000 images of 256 pixels has 2 GB.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.name, self.shape = path, path.name, shape
        try:
            with zipfile.ZipFile(path) as archive:
                self._arrays = {name.removesuffix(".npy") for name in archive.namelist()}
            self.gaussian = self._statistics("mu", "sigma")
            self.spatial = self._statistics("mu_s", "sigma_s")
            self._length = self._check_images() if IMAGES in self._arrays else None
        except DAMAGED as error:
            raise DataError(
                f"reference={path} cannot be read as an .npz file ({error}): give one with {KNOWN}."
            ) from error
        if self._length is None and self.gaussian is None:
            held = ", ".join(sorted(self._arrays)) or "nothing"
            raise DataError(f"reference={path} holds {held}: give a folder of images, or an .npz with {KNOWN}.")

    @cached_property
    def digest(self) -> str:
        found = hashlib.sha256(repr(self.shape).encode())
        with self.path.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
        return found.hexdigest()

    @property
    def n(self) -> int | None:
        return self._length

    def chunks(self, batch_size: int) -> Iterator[Tensor]:
        if self._length is None:
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
            shape, _ = _header(file)
            size = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                content = file.read(count * size)
                if len(content) < count * size:
                    raise DataError(
                        f"reference={self.path} ends in image {start + len(content) // size}: fetch it again."
                    )
                pixels = np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()

    def _statistics(self, mean_name: str, covariance_name: str) -> Gaussian | None:
        if not {mean_name, covariance_name} <= self._arrays:
            return None
        with np.load(self.path, allow_pickle=False) as content:
            mean = np.asarray(content[mean_name], dtype=np.float64)
            covariance = np.asarray(content[covariance_name], dtype=np.float64)
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError(
                f"reference={self.path} has values in {mean_name} or {covariance_name} that are not finite."
            )
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise DataError(
                f"reference={self.path} has {mean_name} of shape {mean.shape} and {covariance_name} of shape "
                f"{covariance.shape}: they must be [D] and [D, D]."
            )
        return Gaussian(mean, covariance)

    def _check_images(self) -> int:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
            shape, dtype = _header(file)
        channels, height, width = self.shape
        if dtype != np.uint8 or len(shape) != 4:
            raise DataError(f"reference={self.path}: {IMAGES} is {dtype} {shape}, and must be uint8 [N, H, W, C].")
        if shape[1:] != (height, width, channels):
            raise DataError(
                f"reference={self.path} has images of {shape[2]} x {shape[1]} pixels, {shape[3]} channels, and the "
                f"samples have {width} x {height}, {channels}: give a reference of that size."
            )
        return int(shape[0])


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array; the file is left where its values begin."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise ValueError("its values are stored by columns")
    return shape, dtype
