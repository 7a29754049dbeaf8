"""Where images come from: a folder with one subfolder per class, or tars of WebDataset."""

from __future__ import annotations

import hashlib
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from flowanchor.errors import ConfigError, DataError

# What an image is called inside a tar: torchvision's extensions.
IMAGES = tuple(extension.lstrip(".") for extension in IMG_EXTENSIONS)


class Source(ABC):
    """Images in a fixed order, each with a name and a label.

    Attributes:
        names: of the images, unique, relative to the root.
        labels: [N] int64, zeros without classes.
        num_classes: 0 without classes.
        class_names: where the source names its classes.
    """

    names: list[str]
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image's file, undecoded; raises `OSError` where it cannot be read."""

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Hash of names and labels: what decides which image is where in the encoded set."""
        content = hashlib.sha256()
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            content.update(f"{name}\t{label}\n".encode())
        return content.hexdigest()


def open_source(root: str | None, labelled: bool = True, num_classes: int | None = None) -> Source:
    """A source by what `root` is: a folder of class folders, a folder of tars, or tars written as `{000..127}.tar`.

    Raises `ConfigError` and `DataError`.
    """
    if not root:
        raise ConfigError("Which images? Add data.root=FOLDER (one subfolder per class, or tars of jpg and cls).")
    path = Path(root).expanduser()
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        source = TarSource(tars, labelled, num_classes) if tars else FolderSource(path, labelled)
    elif str(root).endswith(".tar"):
        from webdataset.shardlists import expand_urls

        source = TarSource([Path(name) for name in expand_urls(str(path))], labelled, num_classes)
    else:
        raise DataError(f"There is no folder {path}: set data.root=FOLDER, or data.root='FOLDER/{{000..127}}.tar'.")
    if num_classes is not None and labelled and source.num_classes != num_classes:
        raise DataError(
            f"{root} has {source.num_classes} classes, but data.num_classes={num_classes}: correct it, or leave it out."
        )
    return source


class FolderSource(Source):
    """Image files; with `labelled`, one subfolder per class in the order of names, else any tree of images."""

    def __init__(self, root: Path, labelled: bool = True) -> None:
        self.root = root
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if labelled else [""]
        if not folders:
            raise DataError(
                f"{root} has no class subfolders: sort the images into one subfolder per class, or add "
                "data.labelled=false."
            )
        self.names, labels = [], []
        for label, folder in enumerate(folders):
            files = sorted(_images_below(root / folder))
            if not files:
                where = f"the class folder {root / folder}" if labelled else root
                raise DataError(f"There are no images in {where} ({', '.join(IMG_EXTENSIONS)}): add some or remove it.")
            self.names += [file.relative_to(root).as_posix() for file in files]
            labels += [label] * len(files)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = len(folders) if labelled else 0
        self.class_names = tuple(folders) if labelled else ()

    def read(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()


class TarSource(Source):
    """Tars of WebDataset: `<key>.jpg` (or png, webp, ...) and, with `labelled`, `<key>.cls`, a whole number.

    The headers are read once, so that any image can be read where it lies. `num_classes`: how many labels there are;
    None: the largest and one.
    """

    def __init__(self, tars: list[Path], labelled: bool = True, num_classes: int | None = None) -> None:
        self.tars = tars
        self.names, self._places, labels = [], [], []
        for number, path in enumerate(tars):
            for key, offset, size, label in _samples(path, labelled):
                self.names.append(f"{path.name}/{key}")
                self._places.append((number, offset, size))
                if num_classes is not None and label >= num_classes:
                    raise DataError(
                        f"Sample {key} of {path} has label {label}, but data.num_classes={num_classes}: its .cls must "
                        f"be between 0 and {num_classes - 1}."
                    )
                labels.append(label)
        if not self.names:
            raise DataError(
                f"There are no images in {', '.join(str(t) for t in tars[:3])}: data.root wants jpg and cls."
            )
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise DataError(f"The sample {twice} is there twice: keys must be unique within a tar.")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = (num_classes or 1 + max(labels)) if labelled else 0

    def read(self, index: int) -> bytes:
        number, offset, size = self._places[index]
        with self.tars[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _images_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())


@dataclass(frozen=True)
class Member:
    """One file of a tar: `<key>.<extension>`; a key may lie in a folder."""

    name: str
    key: str
    extension: str  # lower case
    offset: int
    size: int
    read: Callable[[], bytes]  # while the tar is walked through


def members(path: Path) -> Iterator[Member]:
    """The files of a tar in their order; raises `DataError` without one, for a damaged one and for a cut one."""
    if not path.is_file():
        raise DataError(f"There is no file {path}: set data.root to tars that exist.")
    whole = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if info.isfile() and info.offset_data + info.size > whole:
                    raise DataError(f"{path} is truncated within sample {key}: copy it again.")
                if info.isfile():
                    yield Member(
                        info.name, key, extension.lower(), info.offset_data, info.size, partial(_content, tar, info)
                    )
    except tarfile.TarError as error:
        raise DataError(f"{path} is damaged or no tar ({error}): copy it again.") from error


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(info)
    return b"" if stream is None else stream.read()


def _samples(path: Path, labelled: bool) -> Iterator[tuple[str, int, int, int]]:
    """Key, offset, size and label of each image in a tar; files of one sample follow each other."""
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    for member in members(path):
        if member.extension in IMAGES:
            images[member.key] = (member.offset, member.size)
        elif member.extension == "cls" and labelled:
            classes[member.key] = _label(member, path)
    for key, (offset, length) in images.items():
        if labelled and key not in classes:
            raise DataError(f"Sample {key} of {path} has no .cls: add its label, or add data.labelled=false.")
        yield key, offset, length, classes.get(key, 0)


def _label(member: Member, path: Path) -> int:
    text = member.read().decode(errors="replace").strip()
    if not text.isdigit():
        raise DataError(f"{member.name} of {path} holds {text[:20]!r} and must hold a label, a whole number from 0 on.")
    return int(text)
