"""Where images come from: a folder with one subfolder per class, or tars of WebDataset."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path

import numpy as np

from flowanchor.base.reading import read_regular, shown
from flowanchor.base.walk import is_hidden
from flowanchor.data.labels import CLASSES, read_label, shown_label
from flowanchor.data.picture_files import KNOWN, class_folders, file_mark, find_by_class, tell_unused
from flowanchor.data.pictures import BYTES
from flowanchor.data.tar_members import tar_files
from flowanchor.encoding.tars import read_member, read_tar, tar_names
from flowanchor.errors import ConfigError, DataError


class Source(ABC):
    """Images in a fixed order, each with a name and a label.

    Attributes:
        names: of the images, unique, relative to the root.
        marks: of the images: another one, another content of the file.
        labels: [N] int64, zeros without classes.
        num_classes: 0 without classes.
        class_names: where the source names its classes.
        remarks: sentences about what is there and not used, or odd.
    """

    names: list[str]
    marks: list[str]
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image's file, undecoded; raises `OSError` where it cannot be read."""

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Hash of names and labels: what decides which image is where in the encoded set."""
        content = hashlib.sha256()
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            content.update(f"{name}\t{label}\n".encode(errors="surrogateescape"))
        return content.hexdigest()

    def stamp(self, indices: np.ndarray | None = None) -> str:
        """Hash of the files of some images, or of all, as they are now: their names, sizes and times."""
        content = hashlib.sha256()
        for index in range(len(self)) if indices is None else indices.tolist():
            content.update(f"{self.names[index]}\t{self.marks[index]}\n".encode(errors="surrogateescape"))
        return content.hexdigest()


def open_source(root: str | None, labelled: bool = True, num_classes: int | None = None) -> Source:
    """A source by what `root` is: a folder of class folders, a folder of tars, or tars written as `{000..127}.tar`.

    Raises `ConfigError` and `DataError`.
    """
    if not root:
        raise ConfigError("Which images? Add data.root=FOLDER (one subfolder per class, or tars of jpg and cls).")
    path = Path(root).expanduser()
    tars = tars_of(path)
    if tars:
        source: Source = TarSource(tars, labelled, num_classes)
        source.remarks += tuple(beside_tars(path))
    else:
        source = FolderSource(path, labelled)
    if num_classes is not None and labelled and source.num_classes != num_classes:
        raise DataError(
            f"{root} has {source.num_classes} classes, but data.num_classes={num_classes}: correct it, or leave it out."
        )
    return source


def tars_of(root: Path) -> list[Path]:
    """The tars that `data.root` names: those of a folder (there may be none), one, or `FOLDER/{000..127}.tar`.

    Raises `DataError` where it is neither a folder nor a tar.
    """
    if root.is_dir():
        return tar_files(root)
    if root.suffix.lower() == ".tar":
        from webdataset.shardlists import expand_urls

        return [Path(name) for name in expand_urls(str(root))]
    if root.is_file():
        raise DataError(f"{shown(root)} is neither a folder nor a plain .tar: unpack it, and set data.root=FOLDER.")
    raise DataError(f"There is no folder {shown(root)}: set data.root=FOLDER, or data.root='FOLDER/{{000..127}}.tar'.")


def beside_tars(root: Path) -> list[str]:
    """A line about what a folder of tars holds beside them."""
    unused = Counter[str]()
    for entry in root.iterdir() if root.is_dir() else ():
        if entry.suffix != ".tar" or is_hidden(entry.name):
            kind = "hidden" if is_hidden(entry.name) else entry.suffix.lower() or "without extension"
            unused["folders" if entry.is_dir() else kind] += 1
    return tell_unused(unused, f"{root} beside the tars")


class FolderSource(Source):
    """Image files; with `labelled`, one subfolder per class in the order of names, else any tree of images."""

    def __init__(self, root: Path, labelled: bool = True) -> None:
        self.root = root
        unused = Counter[str]()
        folders = class_folders(root, unused) if labelled else [""]
        if not folders:
            raise DataError(
                f"{root} has no class subfolders: sort the images into one subfolder per class, or add "
                "data.labelled=false."
            )
        self.names, self.marks, labels = [], [], []
        for label, (folder, files) in enumerate(zip(folders, find_by_class(root, folders, unused), strict=True)):
            if not files:
                where = f"the class folder {root / folder}" if labelled else root
                told = " ".join(tell_unused(unused, root))
                raise DataError(f"There are no images in {where} ({KNOWN}): add some or remove it. {told}".rstrip())
            self.names += [file.relative_to(root).as_posix() for file in files]
            self.marks += files.values()
            labels += [label] * len(files)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = len(folders) if labelled else 0
        self.class_names = tuple(folders) if labelled else ()
        self.remarks = tuple(tell_unused(unused, root))

    def read(self, index: int) -> bytes:
        return read_regular(self.root / self.names[index], BYTES)


class TarSource(Source):
    """Tars of WebDataset: `<key>.jpg` (or png, webp, ...) and, with `labelled`, `<key>.cls`, a whole number.

    The headers are read once, so that any image can be read where it lies. `num_classes`: how many labels there are;
    None: the largest and one.
    """

    def __init__(self, tars: list[Path], labelled: bool = True, num_classes: int | None = None) -> None:
        self.tars, self._labelled, self._given = tars, labelled, num_classes
        self.names, self.marks, self._places, labels = [], [], [], []
        unused: Counter[str] = Counter()
        for number, (path, name) in enumerate(zip(tars, tar_names(tars), strict=True)):
            mark, content = str(file_mark(path)), read_tar(path, ("cls",))
            for key, place in content.images.items():
                self.names.append(f"{name}/{key}")
                self.marks.append(mark)
                self._places.append((number, place))
                labels.append(self._label(path, key, content.notes.get(key, {}).get("cls")))
            unused += content.unused
        if not self.names:
            raise DataError(
                f"There are no images in {', '.join(shown(t) for t in tars[:3])}: data.root wants jpg and cls."
            )
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = (num_classes or 1 + max(labels)) if labelled else 0
        self.remarks = (*tell_unused(unused, "the tars"), *self._empty_classes())

    def read(self, index: int) -> bytes:
        number, place = self._places[index]
        return read_member(self.tars[number], place)

    def _label(self, path: Path, key: str, text: bytes | memoryview | None) -> int:
        sample = f"Sample {shown(key)} of {shown(path)}"
        if not self._labelled:
            return 0
        if text is None:
            raise DataError(f"{sample} has no .cls: add its label, or add data.labelled=false.")
        label, most = read_label(text), self._given or CLASSES
        if label is None:
            raise DataError(
                f"{shown(key)}.cls of {shown(path)} holds '{shown_label(text)}' and must hold a label, a whole number "
                "from 0 on."
            )
        if label >= most:
            known = "more than a million classes: is that a label?" if self._given is None else (
                f"but data.num_classes={most}: its .cls must be between 0 and {most - 1}."
            )  # fmt: skip
            raise DataError(f"{sample} has label {label}, {known}")
        return label

    def _empty_classes(self) -> list[str]:
        empty = np.setdiff1d(np.arange(self.num_classes), self.labels)
        shown_ones = ", ".join(map(str, empty[:10].tolist()))
        more = ", ..." if len(empty) > 10 else ""
        return (
            [f"{len(empty):,} of {self.num_classes:,} classes have no image: {shown_ones}{more}."] if len(empty) else []
        )
