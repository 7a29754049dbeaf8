"""What a score needs of N images, collected while they pass by: its size does not depend on N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowanchor.errors import DataError
from flowanchor.metrics.inception_score import InceptionScore, split_of_each
from flowanchor.metrics.moments import Moments

KEPT_SEED = 0  # of the choice of the images whose features are kept
Range = tuple[int, int]  # first index, last index + 1


@dataclass(frozen=True)
class Wanted:
    """What is collected of images 0 ... n - 1.

    Attributes:
        n: number of images.
        splits: of the inception score; 0: none is wanted.
        prefix: moments of the first so many images as well; None: not wanted.
        feature_limit: so many feature vectors are kept (those of a seeded choice of the images; all, where n is less).
    """

    n: int
    splits: int = 0
    prefix: int | None = None
    feature_limit: int = 10_000

    def kept(self) -> np.ndarray:
        """Sorted indices of the images whose features are kept."""
        if self.n <= self.feature_limit:
            return np.arange(self.n)
        return np.sort(np.random.RandomState(KEPT_SEED).choice(self.n, self.feature_limit, replace=False))


@dataclass(frozen=True, eq=False)
class Layers:
    """What an extractor gives for a batch of images."""

    features: np.ndarray  # [B, D]
    logits: np.ndarray | None = None  # [B, K], where the extractor has them
    spatial: np.ndarray | None = None  # [B, S], likewise
    alignment: float | None = None  # CLIP score, summed over the batch, where prompts were given


class Collected:
    """Moments of all features, sums of all predictions, and some feature vectors.

    Parts that were collected apart (by other processes, or before an interruption) are merged; `ranges` says which
    images have been seen.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.features, self.spatial, self.prefix = Moments(), Moments(), Moments()
        self.predictions = InceptionScore(wanted.splits)
        self.ranges: list[Range] = []
        self.seconds = 0.0  # spent on making the images
        self.alignment, self.aligned = 0.0, 0  # sum of CLIP scores, over how many images
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []  # indices, rows
        self._wanted_rows = wanted.kept()
        self._split = split_of_each(wanted.n, wanted.splits) if wanted.splits else None  # a byte per image

    @property
    def n(self) -> int:
        """Images seen."""
        return sum(stop - start for start, stop in self.ranges)

    def add(self, start: int, layers: Layers) -> None:
        """Take in images start, start + 1, ...; raises `DataError` for features that are not finite."""
        stop = start + len(layers.features)
        for rows in (layers.features, layers.logits, layers.spatial):
            if rows is not None and not np.isfinite(rows).all():
                index = start + int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
                raise DataError(
                    f"The extractor's features of image {index} are not finite: check metric.weights, and run with "
                    "device=cpu to see whether the device is at fault."
                )
        self.features.add(layers.features)
        if self.wanted.prefix is not None and start < self.wanted.prefix:
            self.prefix.add(layers.features[: self.wanted.prefix - start])
        if layers.spatial is not None:
            self.spatial.add(layers.spatial)
        if layers.alignment is not None:
            self.alignment += layers.alignment
            self.aligned += len(layers.features)
        if self._split is not None and layers.logits is not None:
            self.predictions.add(self._split[start:stop], layers.logits)
        first, last = np.searchsorted(self._wanted_rows, (start, stop))
        if first < last:
            chosen = self._wanted_rows[first:last]
            self._kept.append((chosen, layers.features[chosen - start].astype(np.float32)))
        self.ranges = join_ranges([*self.ranges, (start, stop)])

    def merge(self, other: Collected) -> None:
        """Take in what was collected of other images."""
        self.features.merge(other.features)
        self.spatial.merge(other.spatial)
        self.prefix.merge(other.prefix)
        self.predictions.merge(other.predictions)
        self.seconds += other.seconds
        self.alignment += other.alignment
        self.aligned += other.aligned
        self._kept += other._kept
        self.ranges = join_ranges([*self.ranges, *other.ranges])

    def kept_features(self) -> np.ndarray:
        """Kept feature vectors [M, D], float32, in the order of their images."""
        indices = np.concatenate([indices for indices, _ in self._kept])
        rows: np.ndarray = np.concatenate([rows for _, rows in self._kept])[np.argsort(indices)]
        return rows

    def size(self) -> int:
        """Bytes held."""
        own = (self._wanted_rows, *(() if self._split is None else (self._split,)))
        return sum(array.nbytes for array in (*own, *self.state().values()))

    def state(self) -> dict[str, np.ndarray]:
        """Everything collected, as arrays; `from_state` takes it back."""
        found = {"ranges": np.array(self.ranges, dtype=np.int64).reshape(-1, 2), "seconds": np.array(self.seconds)}
        if self.aligned:
            found["alignment"] = np.array([self.alignment, self.aligned])
        parts: dict[str, Moments | InceptionScore] = {
            "features": self.features, "spatial": self.spatial, "prefix": self.prefix, "predictions": self.predictions
        }  # fmt: skip
        for name, part in parts.items():
            found |= {f"{name}.{key}": value for key, value in part.state().items()}
        if self._kept:
            found["kept.indices"] = np.concatenate([indices for indices, _ in self._kept])
            found["kept.rows"] = np.concatenate([rows for _, rows in self._kept])
        return found

    @classmethod
    def from_state(cls, wanted: Wanted, state: Mapping[str, Any]) -> Collected:
        """What `state` gave."""

        def part(name: str) -> dict[str, Any]:
            return {key.partition(".")[2]: state[key] for key in state if key.startswith(f"{name}.")}

        found = cls(wanted)
        found.features, found.spatial, found.prefix = (
            Moments.from_state(part(name)) for name in ("features", "spatial", "prefix")
        )
        found.predictions = InceptionScore.from_state(part("predictions"))
        found.seconds = float(state["seconds"])
        if "alignment" in state:
            found.alignment, found.aligned = float(state["alignment"][0]), int(state["alignment"][1])
        found.ranges = [(int(start), int(stop)) for start, stop in state["ranges"]]
        if "kept.rows" in state:
            found._kept = [(state["kept.indices"], state["kept.rows"])]
        return found


def join_ranges(ranges: Sequence[Range]) -> list[Range]:
    """Sorted, neighbours joined; raises `ValueError` where two overlap: an image would count twice."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start < joined[-1][1]:
            raise ValueError(f"images {start} ... {min(stop, joined[-1][1]) - 1} were collected twice")
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined


def remaining(n: int, done: Sequence[Range]) -> list[Range]:
    """What is missing in 0 ... n - 1."""
    edges = [0, *(edge for pair in join_ranges(done) for edge in pair), n]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]


def share(ranges: Sequence[Range], batch_size: int, process: int, processes: int) -> list[Range]:
    """The part of one of several processes, in whole batches.

    Batches begin at multiples of `batch_size` whatever the number of processes: rounding errors that depend on an
    image's neighbours in its batch are then the same, too.
    """
    batches = []
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // batch_size + 1) * batch_size)
            batches.append((start, end))
            start = end
    return join_ranges(batches[process * len(batches) // processes : (process + 1) * len(batches) // processes])
