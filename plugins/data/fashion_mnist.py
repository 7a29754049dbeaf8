"""Fashion-MNIST, or any set of images in the four IDX files of MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from flowanchor.base.reading import open_regular
from flowanchor.data.base import FlowDataModule
from flowanchor.data.images import ArrayImages, ImageSet, interleave_classes
from flowanchor.errors import ConfigError, DataError

CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
BYTES = 1 << 30  # of an unpacked file at most; that of Fashion-MNIST has 47 million
FOLDERS = ("", "raw", "FashionMNIST/raw", "MNIST/raw")  # the folder itself, or torchvision's layout
DOWNLOADS = "data/fashion_mnist"
PLACES = (DOWNLOADS, "/usr/share/datasets/fashion-mnist")  # the second: Debian's package dataset-fashion-mnist
FIRST = "train-images-idx3-ubyte"


class FashionMNISTDataModule(FlowDataModule):
    """60,000 training and 10,000 held-out gray images of 28 x 28, 10 classes (arXiv 1708.07747).

    Args:
        root: folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
            `t10k-labels-idx1-ubyte`, plain or with `.gz`. None: the first of `PLACES` that has them.
        size: 28, or 32 for images with a black border.
        num_classes: 10, or 0 to train without labels.
        download: let torchvision fetch missing files into `root` (never done unless asked).

    Raises:
        DataError: files that are missing or damaged.
    """

    name = "fashion_mnist"

    def __init__(
        self,
        root: str | None = None,
        channels: int = 1,
        size: int = SIDE,
        num_classes: int = 10,
        download: bool = False,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if channels != 1 or size not in (SIDE, 32) or num_classes not in (0, 10):
            raise ConfigError(
                f"data=fashion_mnist has 1 channel, size 28 (or 32, with a border) and 10 classes, not {channels}, "
                f"{size} and {num_classes}: use data.channels=1 data.size=28 data.num_classes=10 (or "
                "data.num_classes=0 to train without labels)."
            )
        self.root, self.download = _folder(root), download
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.class_names = CLASS_NAMES

    def prepare_data(self) -> None:
        """Download, once per machine, and only with `download=true`."""
        if self.download and _find(self.root, FIRST) is None:
            from torchvision.datasets import FashionMNIST

            try:
                FashionMNIST(str(self.root), download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"Fashion-MNIST could not be downloaded into {self.root} ({error}): put its four IDX files there "
                    "yourself, or name a folder that has them with data.root=FOLDER."
                ) from error

    def load(self) -> dict[str, ImageSet]:
        self.prepare_data()
        return {"train": self._read("train"), "heldout": self._read("t10k")}

    def _read(self, part: str) -> ImageSet:
        images = self._idx(f"{part}-images-idx3-ubyte", dimensions=3)
        labels = self._idx(f"{part}-labels-idx1-ubyte", dimensions=1).astype(np.int64)
        if images.shape != (len(labels), SIDE, SIDE) or labels.max(initial=0) > 9:
            raise DataError(
                f"The {part} files in {self.root} hold images {images.shape} and {len(labels)} labels up to "
                f"{labels.max(initial=0)}, not N images of 28 x 28 with labels 0 to 9: set data.root=FOLDER to the "
                "folder of Fashion-MNIST."
            )
        border = (self.size - SIDE) // 2
        pixels = functional.pad(torch.from_numpy(images).unsqueeze(1), [border] * 4)  # [N, 1, H, W]
        everything = ArrayImages(pixels, labels)
        if part == "train":
            return everything
        order = interleave_classes(labels)
        return ArrayImages(pixels[torch.from_numpy(order)], labels[order])

    def _idx(self, name: str, dimensions: int) -> np.ndarray:
        path = _find(self.root, name)
        if path is None:
            raise DataError(
                f"{name}(.gz) is not in {self.root}: set data.root=FOLDER to the folder with Fashion-MNIST's four IDX "
                "files, add data.download=true, or on Debian and Ubuntu install the package dataset-fashion-mnist."
            )
        try:
            return read_idx(path, dimensions)
        except (OSError, ValueError, EOFError, struct.error, zlib.error) as error:
            raise DataError(
                f"{path} is damaged or is no IDX file of bytes ({error}): delete it and add data.download=true, or set "
                "data.root=FOLDER to a folder with the original files."
            ) from error


def _find(root: Path, name: str) -> Path | None:
    candidates = (root / folder / f"{name}{suffix}" for folder in FOLDERS for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _folder(root: str | None) -> Path:
    """The folder of the files: what is named, else the first of the usual ones that has them, else the download's."""
    if root is not None:
        return Path(root).expanduser()
    return next((Path(place) for place in PLACES if _find(Path(place), FIRST) is not None), Path(DOWNLOADS))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or gzipped: magic number `0 0 8 d`, `d` big-endian sizes, the bytes.

    Raises `ValueError` for sizes that are not those of the bytes; no more is read, or unpacked, than they say.
    """
    zipped = path.suffix == ".gz"
    with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) if zipped else raw as file:
        magic, *shape = struct.unpack(f">{1 + dimensions}I", file.read(4 * (1 + dimensions)))
        if magic != 0x0800 + dimensions:
            raise ValueError(f"magic number {magic:#x} instead of {0x0800 + dimensions:#x}")
        count = math.prod(shape)
        if count > BYTES:
            raise ValueError(f"{count:,} bytes, by its header")
        content = file.read(count + 1)
    if len(content) != count:
        raise ValueError(
            f"{'more than ' if len(content) > count else ''}{min(len(content), count):,} of {count:,} bytes"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()
