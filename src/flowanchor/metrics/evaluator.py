"""Scores of a set of images against the training data, and the floor below which no score means anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import hydra.utils
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.utils import get_featuresdict_from_dataset

from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError
from flowanchor.metrics.base import Metric, Prepared

PRC_BATCH = 2000  # rows of the distance matrix at once
MIN_ISC_SPLIT = 50


@dataclass(frozen=True)
class Features:
    """What a metric saw in `n` images: small vectors, the images themselves are gone."""

    features: Tensor  # [N, D]
    logits: Tensor  # [N, K]

    def __len__(self) -> int:
        return len(self.features)

    def first(self, n: int) -> Features:
        """Those of the first `n` images."""
        return Features(self.features[:n], self.logits[:n])


@dataclass(frozen=True)
class Scores:
    """Numbers of one set of images against the reference."""

    n: int
    fd: float  # Frechet distance, squared, as usual
    kid: float  # kernel distance: mean over the subsets
    kid_std: float
    precision: float
    recall: float
    inception_score: float
    inception_score_std: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features [N, D] and [M, D] (arXiv 1706.08500, eq. 6)."""
    statistics = [fid_features_to_statistics(features.double()) for features in (first, second)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


class Evaluator:
    """Measures images of one data set.

        evaluator = Evaluator(metric, data)
        print(evaluator.score(images).fd, evaluator.floor(1000).fd)

    The reference is the train split; its features are extracted once.

    Args:
        metric: a `Metric`, or the config of one.
        data: where reference and floor come from.
        device: where the extractor runs ("cpu", "cuda").
        batch_size: images per call of the extractor.
    """

    def __init__(
        self, metric: Metric | Mapping[str, Any], data: FlowDataModule, device: str = "cpu", batch_size: int = 250
    ) -> None:
        self.metric: Metric = metric if isinstance(metric, Metric) else hydra.utils.instantiate(metric)
        self.data, self.batch_size = data, batch_size
        self.cuda = torch.device(device).type == "cuda"
        self.label = self.metric.label(data)
        self._extractor = self.metric.extractor(data).to(device)
        self._reference: Features | None = None

    @property
    def reference(self) -> Features:
        """Features of the train split."""
        if self._reference is None:
            self._reference = self.features(self.data.images("train"))
        return self._reference

    def features(self, images: Dataset[Tensor]) -> Features:
        """Features of a dataset of uint8 images [C, H, W], read once, in order, in this process."""
        found = get_featuresdict_from_dataset(
            Prepared(images, self.metric), self._extractor, self.batch_size, self.cuda, save_cpu_ram=True, verbose=False
        )
        return Features(found[self.metric.feature_layer], found[self.metric.logits_layer])

    def score(self, images: Dataset[Tensor]) -> Scores:
        """Scores of a dataset of uint8 images [C, H, W] against the train split."""
        return self.score_features(self.features(images))

    def score_features(self, found: Features) -> Scores:
        """As `score`, for features at hand; raises `ConfigError` for fewer samples than a score needs."""
        metric, reference = self.metric, self.reference
        smaller = min(len(found), len(reference))
        if smaller <= metric.neighborhood + 1:
            raise ConfigError(
                f"{len(found)} samples against {len(reference)} are too few for a score: use num_samples=1000 "
                f"(at least {metric.neighborhood + 2})."
            )
        kid = kid_features_to_metric(
            found.features.double(),
            reference.features.double(),
            kid_subsets=metric.kid_subsets,
            kid_subset_size=min(metric.kid_subset_size, smaller // 2),
            verbose=False,
        )
        neighbours = prc_features_to_metric(
            found.features,
            reference.features,
            prc_neighborhood=metric.neighborhood,
            prc_batch_size=PRC_BATCH,
            save_cpu_ram=True,
            verbose=False,
        )
        splits = max(1, min(metric.isc_splits, len(found) // MIN_ISC_SPLIT))
        inception = isc_features_to_metric(found.logits, splits=splits)
        return Scores(
            n=len(found),
            fd=frechet_distance(found.features, reference.features),
            kid=kid[KEY_METRIC_KID_MEAN],
            kid_std=kid[KEY_METRIC_KID_STD],
            precision=neighbours[KEY_METRIC_PRECISION],
            recall=neighbours[KEY_METRIC_RECALL],
            inception_score=inception[KEY_METRIC_ISC_MEAN],
            inception_score_std=inception[KEY_METRIC_ISC_STD],
        )

    def frechet_at(self, found: Features, n: int) -> float:
        """Frechet distance of the first `n` images alone (it depends on n: compare only what has the same n)."""
        return frechet_distance(found.first(n).features, self.reference.features)

    def floor_size(self, num_samples: int) -> int:
        """At how many images the floor of a score at `num_samples` is taken: as many, or all that are held out."""
        return min(num_samples, len(self.data.images("heldout")))

    def floor(self, num_samples: int) -> Scores:
        """Real against real: scores of `floor_size(num_samples)` held-out images."""
        return self.score(self.data.images("heldout").subset(range(self.floor_size(num_samples))))
