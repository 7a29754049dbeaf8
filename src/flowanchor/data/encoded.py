"""What the two layouts of encoded data share: how stored values become samples, and what is done about bad ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowanchor.base.noise import sample_noise
from flowanchor.encoded.manifest import MANIFEST, LatentManifest
from flowanchor.encoded.statistics import STATISTICS, LatentStatistics
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Posterior

VALUES = ("sample", "moments")
FAR = 4.0  # statistics fit where the normalised latents' deviation is within this factor of 1, their mean within +- 2


@dataclass(frozen=True)
class StoredLatents:
    """How stored values [B, C, h, w] (C twice the channels for moments) become samples of the network.

    Attributes:
        shape: of one sample: C, h, w.
        values: `sample` or `moments`, from which a latent is drawn anew each time.
        statistics: what the latents are normalised with.
        seed: of those draws.
    """

    shape: tuple[int, int, int]
    values: str
    statistics: LatentStatistics
    seed: int

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.shape
        return (channels * (2 if self.values == "moments" else 1), height, width)

    def check_shape(self, shape: Sequence[int], source: object) -> None:
        """Raise `DataError` unless what `source` holds of one image has this shape."""
        if tuple(shape) != self.stored_shape:
            raise DataError(
                f"{source} holds latents of {_by(shape)}, but {_by(self.stored_shape)} are expected (data.channels="
                f"{self.shape[0]}, data.size={self.shape[1]}, data.values={self.values}): correct these settings."
            )

    def samples(self, stored: Tensor, indices: np.ndarray, draws: np.ndarray) -> Tensor:
        """float32 [B, C, h, w], normalised; `stored` is used up. Row i is a function of its index and draw."""
        if self.values == "moments":
            posterior = Posterior(*stored.chunk(2, dim=1))
            pairs = zip(indices.tolist(), draws.tolist(), strict=True)
            noise = torch.cat([sample_noise(self.seed, [index], self.shape, draw) for index, draw in pairs])
            stored = posterior.sample(noise.to(stored))
        return self.statistics.normalise_(stored)

    def check_statistics(self, stored: Tensor, source: object) -> None:
        """Raise `DataError` where the statistics are clearly those of other latents; `stored`: a few of these."""
        if not self.statistics.mean:
            return
        plain = LatentStatistics(self.statistics.mean, self.statistics.std)
        finite = stored[stored.flatten(1).isfinite().all(1)]  # the others are counted when they are trained on
        if not len(finite):
            return
        normalised = plain.normalise(finite[:, : self.shape[0]].double())
        std, mean = normalised.std((0, 2, 3)), normalised.mean((0, 2, 3)).abs()
        wrong = (mean > 2) | (std > FAR) | (std < 1 / FAR)
        if bool(wrong.any()):
            channel = int(wrong.nonzero()[0])
            raise DataError(
                f"The statistics do not fit the latents of {source}: channel {channel} has mean {mean[channel]:.2g} "
                f"and standard deviation {std[channel]:.2g} once normalised: use the {STATISTICS} that was written "
                "with them (data.statistics=FILE)."
            )


class BadSamples:
    """Samples that cannot be trained on: counted and replaced up to a limit, by name; then the run stops.

    Each process, and each of its loader workers, counts by itself, a sample that comes in every pass once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left_out: set[str] = set()

    def mend(self, stored: Tensor, labels: np.ndarray, describe: Callable[[int], str]) -> None:
        """Replace rows that are not finite by other rows of the batch; raises `DataError` beyond the limit.

        `describe(row)` says which sample it is, and why it is bad where that is not its values.
        """
        if bool(torch.isfinite(stored.sum())):
            return
        good = stored.flatten(1).isfinite().all(1).numpy()
        rows = np.flatnonzero(good)
        for row in np.flatnonzero(~good):
            self.leave_out(describe(int(row)), alone=not len(rows))
            other = int(rows[int(row) % len(rows)])
            stored[row], labels[row] = stored[other], labels[other]

    def leave_out(
        self,
        name: str,
        instead: str = "another one of its batch",
        advice: str = "repair it",
        alone: bool = False,
    ) -> None:
        """Count a sample, by its name and why it is bad; raises `DataError` beyond the limit.

        Args:
            instead: what takes its place.
            advice: what to do about it, but for leaving it out.
            alone: nothing is there to do so.
        """
        known, count = name in self.left_out, len(self.left_out | {name})
        if count > self.limit or alone:
            raise DataError(
                f"{name}: {advice}, or let up to {count} such samples be left out by data.max_bad={count} "
                f"(now {self.limit}; to an evaluation it is given as +data_overrides.max_bad={count})."
            )
        self.left_out.add(name)
        if not known:
            warnings.warn(
                f"{name}: left out ({count} so far, at most {self.limit}), {instead} takes its place.", stacklevel=3
            )


def read_description(
    root: Path | None, channels: int, size: int, num_classes: int, values: str | None, layout: str
) -> tuple[LatentManifest | None, str]:
    """The manifest of a folder and what its values are; raises where the settings contradict it."""
    if values not in (None, *VALUES):
        raise ConfigError(f"data.values={values} is not known: use {' or '.join(VALUES)}, or leave it out.")
    manifest = None if root is None else LatentManifest.read(root)
    if manifest is None:
        if root is not None and (root / ".encoding").is_dir():
            raise DataError(f"{root} is not encoded to its end: run the same encode.py command again, it goes on.")
        return None, values or "sample"
    where = f"{root}/{MANIFEST}"
    if manifest.layout != layout:
        option = {"safetensors": "latents"}.get(manifest.layout, manifest.layout)
        raise ConfigError(f"{where} says format={manifest.layout}: use data={option}.")
    expected = {
        "channels": (channels, manifest.shape[0]),
        "size": (size, manifest.shape[1]),
        "values": (values or manifest.values, manifest.values),
    }
    if num_classes:
        expected["num_classes"] = (num_classes, manifest.num_classes)
    check_settings(expected, where)
    return manifest, manifest.values


def check_settings(expected: Mapping[str, tuple[Any, Any]], manifest: object) -> None:
    """Raise `ConfigError` for the first setting (ours, theirs) that is not what the manifest says."""
    for name, (ours, theirs) in expected.items():
        if ours != theirs:
            raise ConfigError(f"data.{name}={ours}, but {manifest} says {theirs}: use data.{name}={theirs}.")


def read_statistics(source: Any, root: Path | None, channels: int) -> LatentStatistics:
    """What the latents are normalised with: as given, else the file beside the latents; raises `DataError`."""
    if source is None:
        path = None if root is None else root / STATISTICS
        if path is None or not path.is_file():
            raise DataError(
                f"There is no {STATISTICS} beside the latents: add data.statistics=FILE, numbers such as "
                "'data.statistics={multiplier: 0.18215}', or {multiplier: 1} to leave them as they are."
            )
        source = path
    statistics = LatentStatistics.read(source)
    statistics.check(channels, "data.statistics" if not isinstance(source, Path) else source)
    return statistics


def check_labels(labels: np.ndarray, num_classes: int, describe: Callable[[int], str]) -> None:
    """Raise `DataError` for the first label that is none."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes)) if num_classes else np.array([], dtype=np.int64)
    if len(wrong):
        raise DataError(
            f"{describe(int(wrong[0]))} has label {labels[wrong[0]]}, but data.num_classes={num_classes}: labels must "
            f"be 0 to {num_classes - 1} ({len(wrong)} are not)."
        )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
