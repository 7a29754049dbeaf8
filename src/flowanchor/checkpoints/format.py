"""What one kind of released weights must be able to do: the contract of the `format` group (docs/add_a_format.md).

    python src/convert.py checkpoint=RELEASED output=NAME.safetensors   # a format recognises RELEASED and reads it
    python src/convert.py checkpoint=RUN output=FOLDER format=NAME      # the format of that name writes FOLDER

What flowanchor itself trains and writes needs no format to be read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.checkpoints.fit import compare
from flowanchor.checkpoints.hashing import content_digest
from flowanchor.checkpoints.summary import count, fit_lines, network_lines
from flowanchor.errors import FlowAnchorError
from flowanchor.weights import Joined, LazyWeights


@dataclass(frozen=True)
class Choices:
    """What a user says about released weights; None: read off them, or asked for where that is impossible."""

    ema: str | None = None  # which of several sets
    backbone: str | None = None  # the name of an option
    kind: str | None = None
    interval: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    codec: Mapping[str, Any] | None = None  # the entry of a configuration


@dataclass(frozen=True)
class DescribedWeights:
    """One set of weights with all that is needed to open it, whatever it came from."""

    file: Path
    weights: Mapping[str, Tensor]
    meta: dict[str, Any]  # format, kind, step, config: what a checkpoint has under `flowanchor`
    ema: str = "none"  # which weights these are: the name of an average, or "none" for the raw ones
    raw: Mapping[str, Tensor] | None = None  # the weights without averaging, where the file has them too

    def as_checkpoint(self) -> dict[str, Any]:
        """The same in the form of a checkpoint."""
        if self.ema != "none":
            return {"flowanchor": self.meta, "state_dict": {}, "ema": {self.ema: self.weights}}
        lazy = isinstance(self.weights, LazyWeights)
        named = Joined({"student.": self.weights})
        return {"flowanchor": self.meta, "state_dict": named if lazy else dict(named)}


class Format(ABC):
    """One kind of released weights. Built without arguments for reading, and by its option for writing.

    A path is shown to every registered format, those of flowanchor first, in the order of their classes' names; the
    first that recognises it reads it. Nothing in a file may run code, or choose a class to be built: read it by
    `flowanchor.checkpoints.inert.read_inert` or safetensors, and describe the network without building it.

    Attributes:
        name: as in `format=NAME`.
        suffix: of the file that it writes; empty: it writes a folder; None: it writes nothing.
        in_place: whether every program opens what it recognises where it lies (`checkpoint=`, `teacher.checkpoint=`,
            `initialise_from=`); otherwise it is converted first.
        broad: whether it recognises more than its own kind, and is therefore asked after those that do not.
        casts: whether `dtype=` has been applied to the weights that it writes; otherwise it has a setting of its own.
        parts: names of networks that it joins into one (`checkpoint={high: PATH, low: PATH}`).
        predictions: what networks may predict that it writes (`Backbone.predicts`): whoever reads a layout of others
            takes a prediction for a velocity.
    """

    name: str
    suffix: str | None = None
    in_place: bool = False
    broad: bool = False
    casts: bool = True
    parts: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ("v",)

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file or folder is of this kind. Asked of any path: it must be quick, and raise nothing."""

    def read(self, path: Path, choices: Choices) -> DescribedWeights:
        """One set of weights, not read yet where that can be avoided, and a description of its network.

        Raises `CheckpointError` for what is damaged or unsafe, and where something must be chosen.
        """
        raise NotImplementedError

    def join(self, paths: Mapping[str, str], choices: Choices) -> DescribedWeights:
        """The checkpoints of all `parts` as one network."""
        raise NotImplementedError

    def digest(self, path: Path) -> str:
        """sha256, hex, of what identifies such weights; here of all that they hold."""
        return content_digest(path)

    def inspect(self, path: Path, choices: Choices) -> Iterator[str]:
        """Lines about a file for `convert.py inspect=FILE`; the first names it, the others are indented by two."""
        found = self.read(path, choices)
        backbone = found.meta["config"]["backbone"]
        yield f"{path}: weights of format={self.name}"
        yield f"  trained as   {found.meta['kind']}, step {found.meta['step'] or 'not told'}"
        yield f"  weights      {found.ema}: {count(found.weights)}"
        yield from network_lines(backbone)
        try:
            yield from fit_lines(compare(found.weights, backbone, path))
        except FlowAnchorError as error:
            yield f"  no match     {error}"

    def check(self) -> None:  # noqa: B027 - most formats need no setting
        """Raise `ConfigError` where a setting is missing; asked before anything is read."""

    def replaces(self, output: Path) -> bool:
        """Whether what lies at `output` is an earlier output of this format, which `overwrite=true` may replace."""
        return output.is_file()

    def write(self, given: DescribedWeights, output: Path) -> str:
        """Write weights, which are known to be finite and those of their network, in one move; returns what was
        written, in a few words. Raises `CheckpointError` for a network that this format cannot hold."""
        raise NotImplementedError
