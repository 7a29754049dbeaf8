"""An .npz file as the reference: ADM's batches of images and statistics, or statistics alone."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowanchor.base.reading import open_regular, shown
from flowanchor.data.npy import byte_count, read_header
from flowanchor.errors import DataError
from flowanchor.metrics.frechet import Gaussian
from flowanchor.metrics.reference_base import Reference, Shape

FEATURES = 10_000  # of statistics at most: their covariance has 0.8 GB
PACKED = 1_100  # bytes that one byte of a zip's ordinary compression can stand for, at most
IMAGES = "arr_0"  # uint8 [N, H, W, C]
KNOWN = "arr_0 (images, uint8 [N, H, W, C]), or mu and sigma (statistics), as in ADM's reference batches"


class NpzReference(Reference):
    """`arr_0` are images, `mu` and `sigma` statistics of Inception's pooled features, `mu_s` and `sigma_s` of its
    spatial ones. Images are read in pieces: a file of 10,000 images of 256 pixels has 2 GB.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.name, self.shape = path, path.name, shape
        try:
            with self._opened() as archive:
                self._arrays = {name.removesuffix(".npy") for name in archive.namelist()}
                self.gaussian = self._statistics(archive, "mu", "sigma")
                self.spatial = self._statistics(archive, "mu_s", "sigma_s")
                self._length = self._check_images(archive) if IMAGES in self._arrays else None
        except DataError:
            raise
        except Exception as error:  # a zip can be broken in more ways than `zipfile` has errors for
            reason = shown(error)[:200] or type(error).__name__
            raise DataError(
                f"reference={path} cannot be read as an .npz file ({reason}): give one with {KNOWN}."
            ) from error
        if self._length is None and self.gaussian is None:
            held = shown(", ".join(sorted(self._arrays)))[:200] or "nothing"
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
        with self._opened() as archive, archive.open(f"{IMAGES}.npy") as file:
            shape, _ = read_header(file, "u")
            size = math.prod(shape[1:])
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                try:
                    content = file.read(count * size)
                except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise DataError(f"reference={self.path} is damaged ({shown(error)}): fetch it again.") from error
                if len(content) < count * size:
                    raise DataError(
                        f"reference={self.path} ends in image {start + len(content) // size}: fetch it again."
                    )
                pixels = np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        with open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
            yield archive

    def _statistics(self, archive: zipfile.ZipFile, mean_name: str, covariance_name: str) -> Gaussian | None:
        if not {mean_name, covariance_name} <= self._arrays:
            return None
        mean, covariance = (self._read(archive, name) for name in (mean_name, covariance_name))
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

    def _read(self, archive: zipfile.ZipFile, name: str) -> np.ndarray:
        """An array of statistics, float64; raises `ValueError` before reading one that is none."""
        with archive.open(f"{name}.npy") as file:
            header = shape, dtype = read_header(file, "fiu")
            if len(shape) > 2 or any(side > FEATURES for side in shape):
                raise ValueError(f"{name} has the shape {shape}")
            content = file.read(byte_count(header) + 1)
        if len(content) != byte_count(header):
            raise ValueError(f"{name} has another shape than its {len(content):,} bytes")
        return np.frombuffer(content, dtype).reshape(shape).astype(np.float64)

    def _check_images(self, archive: zipfile.ZipFile) -> int:
        entry = archive.getinfo(f"{IMAGES}.npy")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{IMAGES} is packed in another way than NumPy's")
        with archive.open(entry) as file:
            header = shape, dtype = read_header(file, "bfiu")
            start = file.tell()
        channels, height, width = self.shape
        if dtype != np.uint8 or len(shape) != 4:
            raise DataError(f"reference={self.path}: {IMAGES} is {dtype} {shape}, and must be uint8 [N, H, W, C].")
        if shape[1:] != (height, width, channels):
            raise DataError(
                f"reference={self.path} has images of {shape[2]} x {shape[1]} pixels, {shape[3]} channels, and the "
                f"samples have {width} x {height}, {channels}: give a reference of that size."
            )
        packed = PACKED if entry.compress_type == zipfile.ZIP_DEFLATED else 1
        there = min(entry.file_size - start, packed * self.path.stat().st_size)
        if byte_count(header) > there:
            raise DataError(
                f"reference={self.path} ends in image {max(0, there) // math.prod(shape[1:]):,} of {shape[0]:,}: fetch "
                "it again."
            )
        return int(shape[0])
