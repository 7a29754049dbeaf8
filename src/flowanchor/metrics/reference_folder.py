"""A folder of images as the reference."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowanchor.base.files import read_note, sha256
from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.base.reading import shown
from flowanchor.data.picture_files import KNOWN, find_by_class, tell_unused
from flowanchor.data.pictures import PictureError, open_picture
from flowanchor.encoding.crop import center_crop
from flowanchor.errors import DataError
from flowanchor.metrics.reference_base import Reference, Shape
from flowanchor.metrics.storage import cache_folder, write_whole


class ImageTree(Reference):
    """All image files below a folder, in the order of their names; gray or RGB as the evaluated images are."""

    def __init__(self, root: Path, shape: Shape, crop: bool = False, cache_dir: str | None = None) -> None:
        self.root, self.name, self.shape, self.crop = root, root.resolve().name, shape, crop
        self._cache = None if cache_dir is None else cache_folder(cache_dir)
        unused = Counter[str]()
        (self._marks,) = find_by_class(root, [""], unused)
        self.files = list(self._marks)
        told = " ".join(tell_unused(unused, root))
        if not self.files:
            raise DataError(f"There are no images in reference={root}: give a folder with {KNOWN}. {told}".rstrip())
        if told:
            rank_zero_info(told)
        self._read(self.files[0])  # an image of another size is told before anything is generated

    @property
    def n(self) -> int:
        return len(self.files)

    @cached_property
    def digest(self) -> str:
        """Of names, contents and crop. Remembered by names, sizes and times: a large folder is not read twice."""
        names = [path.relative_to(self.root).as_posix() for path in self.files]
        marks = list(zip(names, self._marks.values(), strict=True))
        stamp = hashlib.sha256(json.dumps([str(self.root.resolve()), marks]).encode()).hexdigest()
        note = None if self._cache is None else self._cache / f"folder-{stamp[:16]}.json"
        known = None if note is None else read_note(note)
        if known is not None and isinstance(known.get("content"), str):
            content = known["content"]
        else:
            found = hashlib.sha256()
            for name, path in zip(names, self.files, strict=True):
                found.update(name.encode(errors="surrogateescape") + bytes.fromhex(sha256(path)))
            content = found.hexdigest()
            if note is not None:
                write_whole(note, json.dumps({"content": content}).encode())
        return hashlib.sha256(f"{content} {self.shape} {self.crop}".encode()).hexdigest()

    def chunks(self, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.files), batch_size):
            yield torch.stack([self._read(path) for path in self.files[start : start + batch_size]])

    def _read(self, path: Path) -> Tensor:
        channels, height, width = self.shape
        try:
            image = open_picture(path, "L" if channels == 1 else "RGB")
        except PictureError as error:
            raise DataError(
                f"{shown(path)} cannot be read as an image ({error.reason}): repair it, or remove it from reference="
                f"{self.root}."
            ) from error
        if self.crop:
            image = center_crop(image, height)
        if image.size != (width, height):
            raise DataError(
                f"{shown(path)} has {image.width} x {image.height} pixels and the samples have {width} x {height}: "
                "give a reference of that size, or cut its images by reference_crop=true."
            )
        return pil_to_tensor(image)
