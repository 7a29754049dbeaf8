"""CIFAR-10 from its binary or its Python files; the latter are pickles and are read without running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowanchor.base.reading import read_regular, shown
from flowanchor.data.base import FlowDataModule
from flowanchor.data.images import ArrayImages, ImageSet, interleave_classes
from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data.array_pickle import load_arrays

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
BYTES = 1 << 30  # of a file at most; one of CIFAR-10 has 31 million
PARTS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "heldout": ["test_batch"]}


class CIFAR10DataModule(FlowDataModule):
    """50,000 training and 10,000 held-out colour images of 32 x 32, 10 classes (Krizhevsky 2009).

    Args:
        root: a folder with `cifar-10-batches-bin` or `cifar-10-batches-py`, or that folder itself.
        num_classes: 10, or 0 to train without labels.
        mirror: train on mirrored copies as well: the set counts twice.
        download: let torchvision fetch missing files into `root` (never done unless asked).

    Raises:
        DataError: files that are missing, damaged, or hold more than arrays and labels.
    """

    name = "cifar10"

    def __init__(
        self,
        root: str,
        channels: int = 3,
        size: int = 32,
        num_classes: int = 10,
        mirror: bool = True,
        download: bool = False,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if (channels, size) != (3, 32) or num_classes not in (0, 10):
            raise ConfigError(
                f"data=cifar10 has 3 channels, size 32 and 10 classes, not {channels}, {size} and {num_classes}: use "
                "data.channels=3 data.size=32 data.num_classes=10 (or data.num_classes=0 to train without labels)."
            )
        self.root, self.download, self.mirror = Path(root).expanduser(), download, mirror
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.class_names = CLASS_NAMES

    def prepare_data(self) -> None:
        """Download, once per machine, and only with `download=true`."""
        if self.download and self._find(PARTS["heldout"][0]) is None:
            from torchvision.datasets.cifar import CIFAR10
            from torchvision.datasets.utils import download_and_extract_archive

            try:
                download_and_extract_archive(
                    CIFAR10.url, str(self.root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5
                )
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"CIFAR-10 could not be downloaded into {self.root} ({error}): put its files there yourself, or "
                    "name a folder that has them with data.root=FOLDER."
                ) from error

    def load(self) -> dict[str, ImageSet]:
        self.prepare_data()
        return {split: self._read(names, split) for split, names in PARTS.items()}

    def _read(self, names: list[str], split: str) -> ImageSet:
        parts = [self._file(name) for name in names]
        images = np.concatenate([pixels for pixels, _ in parts])
        labels = np.concatenate([found for _, found in parts])
        order = interleave_classes(labels) if split == "heldout" else np.arange(len(labels))
        return ArrayImages(torch.from_numpy(images[order]), labels[order])

    def _find(self, name: str) -> Path | None:
        candidates = (self.root / folder / file for folder in FOLDERS for file in (f"{name}.bin", name))
        return next((path for path in candidates if path.is_file()), None)

    def _file(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        path = self._find(name)
        if path is None:
            raise DataError(
                f"{name}(.bin) is not in {self.root}: set data.root=FOLDER to the folder with CIFAR-10's files, or add "
                "data.download=true."
            )
        try:
            pixels, labels = _read_binary(path) if path.suffix == ".bin" else _read_pickle(path)
            images = pixels.reshape(-1, *SHAPE)
            if len(images) != len(labels) or labels.max(initial=0) > 9 or labels.min(initial=0) < 0:
                raise ValueError(f"{len(images)} images and {len(labels)} labels up to {labels.max(initial=0)}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path} is damaged or no file of CIFAR-10 ({shown(error)[:200]}): delete it and add "
                "data.download=true, or set data.root=FOLDER to a folder with the original files."
            ) from error
        return images, labels


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label and 3,072 pixels."""
    rows = np.frombuffer(read_regular(path, BYTES), dtype=np.uint8).reshape(-1, 1 + int(np.prod(SHAPE)))
    return rows[:, 1:].copy(), rows[:, 0].astype(np.int64)


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = load_arrays(read_regular(path, BYTES))
    pixels, labels = content[b"data"], content[b"labels"]
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or any(type(n) is not int for n in labels):
        raise ValueError("its data is no array, or its labels are no list of whole numbers")
    return pixels, np.asarray(labels, dtype=np.int64)
