"""The metric of small data sets: features of a classifier trained on them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError, DataError
from flowanchor.metrics.base import LAYERS, Metric, SmallExtractor
from flowanchor.plugins.metrics.classifier import (
    ClassifierSpec,
    SmallClassifier,
    TrainedClassifier,
    cached_classifier,
)

EXTRACTOR = "flowanchor-small-classifier"


class SmallClassifierExtractor(SmallExtractor):
    """A `SmallClassifier` as torch-fidelity wants one."""

    def __init__(self, name: str, features_list: list[str], classifier: SmallClassifier, **_: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.chosen(*self.classifier(images))


if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR, SmallClassifierExtractor)


class SmallMetric(Metric):
    """Frechet distance and the others on a small classifier's features, called `FD-<data>`.

    The classifier is trained once on the train split (seconds for digits) and cached.

    Args:
        cache_dir: folder of the trained classifiers, and of the references' features.
        seed, steps: of the classifier's training.
        statistics: see `Metric`.
    """

    feature_layer, logits_layer = LAYERS

    def __init__(self, cache_dir: str, seed: int = 0, steps: int = 400, **statistics: Any) -> None:
        super().__init__(cache_dir=cache_dir, **statistics)
        self.classifier_dir, self.seed, self.steps = cache_dir, seed, steps

    def label(self, data: FlowDataModule | None) -> str:
        return f"FD-{_needed(data).name}"

    def classifier(self, data: FlowDataModule) -> TrainedClassifier:
        """The classifier of this data; raises `DataError` without labels."""
        train, heldout = data.images("train"), data.images("heldout")
        if train.labels is None or heldout.labels is None:
            raise DataError(
                f"metric=small trains a classifier, but the images of {data.name} have no labels: use "
                "metric=inception, or sort the images into one subfolder per class."
            )
        spec = ClassifierSpec(
            channels=data.channels,
            size=data.size,
            num_classes=int(train.labels.max()) + 1,
            seed=self.seed,
            steps=self.steps,
        )
        return cached_classifier(train, heldout, spec, self.classifier_dir, data.name)

    def extractor(self, data: FlowDataModule | None) -> SmallExtractor:
        trained = self.classifier(_needed(data))
        return create_feature_extractor(EXTRACTOR, list(LAYERS), cuda=False, verbose=False, classifier=trained.model)


def _needed(data: FlowDataModule | None) -> FlowDataModule:
    if data is None:
        raise ConfigError(
            "metric=small is trained on the images of the checkpoint's own data: leave reference out, or use "
            "metric=inception (metric=random to try the program)."
        )
    return data
