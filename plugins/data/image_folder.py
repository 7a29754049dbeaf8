"""Images in a folder, one subfolder per class."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowanchor.base.files import sha256
from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.data.base import FlowDataModule
from flowanchor.data.encoded import BadSamples
from flowanchor.data.images import ImageSet, split_heldout
from flowanchor.data.picture_files import KNOWN, class_folders, find_by_class, find_pictures, tell_unused
from flowanchor.data.pictures import PictureError, open_picture
from flowanchor.errors import ConfigError, DataError


class ImageFolderDataModule(FlowDataModule):
    """Image files, cropped to a centred square and resized; a fixed share of them is held out.

    Args:
        root: with `labelled`, a folder with one subfolder per class (in the order of names); otherwise any folder.
        size: height and width after the resize.
        channels: 3 (RGB) or 1 (gray).
        num_classes: number of class subfolders, 0 for unlabelled images.
        labelled: whether the subfolders are classes.
        mirror: train on mirrored copies as well: the set counts twice, no random flips.
        heldout: share of the images (of each class) that is held out.
        max_bad: images that cannot be read that are left out before training stops; another one of the class takes the
            place of each.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: an empty folder, no class folders, another number of classes, or a file that is no image.
    """

    def __init__(
        self,
        root: str | None,
        size: int,
        channels: int = 3,
        num_classes: int = 0,
        labelled: bool = True,
        mirror: bool = False,
        heldout: float = 0.1,
        max_bad: int = 0,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if not root:
            raise ConfigError("data=image_folder needs to know the folder: add data.root=FOLDER.")
        if channels not in (1, 3):
            raise ConfigError(f"data.channels={channels} is neither gray nor RGB: use data.channels=1 or 3.")
        if not labelled and num_classes:
            raise ConfigError(
                f"data.labelled=false has no classes, but data.num_classes={num_classes}: add data.num_classes=0."
            )
        if size < 1 or num_classes < 0:
            raise ConfigError(f"data.size={size} must be at least 1 and data.num_classes={num_classes} at least 0.")
        if not 0 < heldout < 1:
            raise ConfigError(f"data.heldout={heldout} is no share between 0 and 1: for example data.heldout=0.1.")
        if max_bad < 0:
            raise ConfigError(f"data.max_bad={max_bad} must be at least 0.")
        self.root = Path(root).expanduser()
        self.name = self.root.resolve().name
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.labelled, self.mirror, self.heldout, self.max_bad = labelled, mirror, heldout, max_bad

    def load(self) -> dict[str, ImageSet]:
        unused = Counter[str]()
        files, labels = self._labelled_files(unused) if self.labelled else (self._unlabelled_files(unused), None)
        for line in tell_unused(unused, self.root):
            rank_zero_info(line)
        everything = FolderImages(files, labels, self.root, self.channels, self.size)
        counts = [len(files)] if labels is None else np.bincount(labels).tolist()
        held = [min(count - 1, max(1, round(count * self.heldout))) for count in counts]
        if sum(held) == 0:
            raise DataError(
                f"{self.root} has one image per class, so none can be held out: add images, or set data.root=FOLDER."
            )
        train, heldout = split_heldout(labels, len(files), held)
        return {
            name: ReadableImages(everything.subset(part), self.max_bad)
            for name, part in (("train", train), ("heldout", heldout))
        }

    def _labelled_files(self, unused: Counter[str]) -> tuple[list[Path], np.ndarray]:
        folders = class_folders(self.root, unused) if self.root.is_dir() else []
        if not folders:
            raise DataError(self._why_unlabelled())
        files, labels = [], []
        for label, (folder, pictures) in enumerate(
            zip(folders, find_by_class(self.root, folders, unused), strict=True)
        ):
            found = sorted(pictures, key=lambda path: (str(path.parent), path.name))
            if not found:
                told = " ".join(tell_unused(unused, self.root))
                raise DataError(
                    f"{self.root} has a class folder without images, {folder}: remove it, or add images ({KNOWN}). "
                    f"{told}".rstrip()
                )
            files += found
            labels += [label] * len(found)
        if len(folders) != self.num_classes:
            raise DataError(
                f"{self.root} has {len(folders)} class folders, but data.num_classes={self.num_classes}: "
                f"add data.num_classes={len(folders)}."
            )
        self.class_names = tuple(folders)
        return files, np.asarray(labels, dtype=np.int64)

    def _why_unlabelled(self) -> str:
        if not self.root.is_dir():
            return f"There is no folder {self.root}: set data.root=FOLDER to a folder with one subfolder per class."
        loose = "images but no" if find_pictures(self.root) else "neither images nor"
        return (
            f"{self.root} has {loose} class subfolders: sort the images into one subfolder per class, or train "
            "without labels by data.labelled=false data.num_classes=0."
        )

    def _unlabelled_files(self, unused: Counter[str]) -> list[Path]:
        files = list(find_by_class(self.root, [""], unused)[0]) if self.root.is_dir() else []
        if not files:
            what = "are no images in" if self.root.is_dir() else "is no folder"
            told = " ".join(tell_unused(unused, self.root))
            raise DataError(
                f"There {what} {self.root}: set data.root=FOLDER to a folder with images ({KNOWN}). {told}".rstrip()
            )
        return files


class FolderImages(ImageSet):
    """Image files, read when asked for: centre crop to a square, bicubic resize."""

    def __init__(self, files: Sequence[Path], labels: np.ndarray | None, root: Path, channels: int, size: int) -> None:
        self.files, self.labels, self.root = list(files), labels, root
        self.channels, self.size = channels, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = open_picture(self.files[index], "L" if self.channels == 1 else "RGB")
        return pil_to_tensor(ImageOps.fit(pixels, (self.size, self.size), method=Image.Resampling.BICUBIC))

    def digest(self) -> str:
        content = hashlib.sha256(repr((self.channels, self.size)).encode())
        for path in self.files:
            content.update(path.relative_to(self.root).as_posix().encode(errors="surrogateescape"))
            content.update(bytes.fromhex(sha256(path)))
        return content.hexdigest()


class ReadableImages(ImageSet):
    """A set in which others of their class take the places of up to `max_bad` images that cannot be read.

    What takes a place is the next one that can be read: the same in every pass, whoever reads.
    """

    def __init__(self, images: ImageSet, max_bad: int) -> None:
        self.images, self.labels, self.bad = images, images.labels, BadSamples(max_bad)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        for candidate in self._candidates(index):
            try:
                return self.images[candidate]
            except PictureError as error:
                self.bad.leave_out(error.fault, "another one of its class", "repair the file or remove it")
        raise DataError(f"No image of the class of image {index} can be read: check data.root.")

    def _candidates(self, index: int) -> Iterator[int]:
        """The image itself, and those of its class behind it, from the first one on after the last."""
        yield index
        alike = np.arange(len(self)) if self.labels is None else np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(alike, -int(np.searchsorted(alike, index)))[1:].tolist()

    def digest(self) -> str:
        return self.images.digest()
