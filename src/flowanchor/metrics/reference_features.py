"""What the scores need of a reference: looked at once, then from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from flowanchor.errors import ConfigError, DataError
from flowanchor.metrics.base import Metric
from flowanchor.metrics.collected import Collected, Layers, Wanted
from flowanchor.metrics.frechet import Gaussian
from flowanchor.metrics.reference_base import Reference
from flowanchor.metrics.storage import cache_folder, read_arrays, write_whole

VERSION = 1  # of what is stored


class Looker(Protocol):
    """What looks at the images of a reference: an `Evaluator`, and what it says of itself."""

    metric: Metric
    label: str
    source: Reference
    batch_size: int

    @property
    def extractor_digest(self) -> str: ...

    def look(self, images: Tensor) -> Layers: ...

    def collect(self, chunks: Iterable[Tensor], wanted: Wanted) -> Collected: ...


@dataclass(frozen=True, eq=False)
class ReferenceFeatures:
    """Moments of all features of the reference, and some of the features themselves."""

    features: Gaussian
    spatial: Gaussian | None  # None: sFID cannot be had
    kept: np.ndarray | None  # [M, D], float32; None: statistics alone, no kernel distance, precision and recall
    n: int | None  # images; None: not known

    def missing(self, spatial_layer: str | None) -> dict[str, str]:
        """Scores of a metric that cannot be had, and why."""
        found: dict[str, str] = {}
        if self.kept is None:
            why = "the reference holds statistics, no images"
            found |= dict.fromkeys(("kid", "precision", "recall"), why)
        if self.spatial is None and spatial_layer is not None:
            found["sfid"] = "the reference holds no spatial statistics (mu_s, sigma_s)"
        return found


def cached_features(evaluator: Looker) -> ReferenceFeatures:
    """The features of an evaluator's reference.

    Statistics that come with it are taken where they are of the extractor's size. Everything else is extracted from
    its images, once per content and extractor.
    """
    reference, gaussian, spatial = evaluator.source, *_given(evaluator)
    if reference.n is None and gaussian is not None:
        return ReferenceFeatures(gaussian, spatial, None, None)
    if not reference.n or (reference.n < 2 and gaussian is None):
        raise ConfigError(f"The reference {reference.name} has {reference.n} images: give one of at least 1,000.")
    collected = _collected(evaluator, reference)
    found = {"features": gaussian, "spatial": spatial}
    for name, moments in (("features", collected.features), ("spatial", collected.spatial)):
        # Images beside statistics are a part of what the statistics are of: they never stand in for them.
        if gaussian is None and moments.n > 1:
            found[name] = moments.gaussian()
    assert found["features"] is not None
    return ReferenceFeatures(found["features"], found["spatial"], collected.kept_features(), reference.n)


def _given(evaluator: Looker) -> tuple[Gaussian | None, Gaussian | None]:
    """Statistics that come with the reference and fit the extractor; raises `DataError` where nothing fits."""
    reference = evaluator.source
    if reference.gaussian is None:
        return None, None
    blank = evaluator.look(torch.zeros(1, *reference.shape, dtype=torch.uint8))
    size, given = blank.features.shape[1], len(reference.gaussian.mean)
    if given != size:
        if reference.n:
            return None, None  # its images serve any extractor
        raise DataError(
            f"The reference {reference.name} holds statistics of {given} features, and the extractor of this metric "
            f"({evaluator.label}) has {size}: use metric=inception for published statistics, or reference=FOLDER."
        )
    if reference.spatial is None or blank.spatial is None:
        return reference.gaussian, None
    if len(reference.spatial.mean) != blank.spatial.shape[1]:
        raise DataError(
            f"The reference {reference.name} holds spatial statistics (mu_s) of another size than the extractor's "
            f"{blank.spatial.shape[1]}: use metric=inception."
        )
    return reference.gaussian, reference.spatial


def _collected(evaluator: Looker, reference: Reference) -> Collected:
    """From the cache, or from the images."""
    assert reference.n is not None
    wanted = Wanted(reference.n, feature_limit=evaluator.metric.feature_limit)
    path = None
    if evaluator.metric.cache_dir is not None:
        parts = [VERSION, reference.digest, evaluator.extractor_digest, wanted.n, wanted.feature_limit]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        path = cache_folder(evaluator.metric.cache_dir) / f"reference-{key}.npz"
        stored = read_arrays(path)
        if stored is not None:
            return Collected.from_state(wanted, stored)
    chunks = reference.chunks(evaluator.batch_size)
    steps = -(-reference.n // evaluator.batch_size)
    found = evaluator.collect(
        track(chunks, f"looking at the reference {reference.name}, once", steps, transient=True), wanted
    )
    if path is not None:
        write_whole(path, found.state())
    return found
