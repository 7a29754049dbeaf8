"""The metric that published numbers use: Inception's features, and the name FID."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError
from flowanchor.metrics.base import Metric

EXTRACTOR = "flowanchor-inception-v3-compat"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SPATIAL = "spatial"
SPATIAL_CHANNELS = 7  # 17 x 17 x 7 = 2,023 numbers


class InceptionExtractor(FeatureExtractorInceptionV3):
    """torch-fidelity's `inception-v3-compat` with one layer more: `spatial` [B, 2023].

    It is what sFID is defined on (arXiv 2103.03841) in ADM's evaluation: the first 7 channels of the graph's
    `mixed_6/conv`, which is `Mixed_6d.branch1x1` here, in the order height, width, channel.
    """

    def __init__(self, name: str, features_list: list[str], **settings: Any) -> None:
        own = [layer for layer in features_list if layer != SPATIAL]
        super().__init__(name, own, **settings)
        self.asked = list(features_list)
        self._seen: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._see)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(self.features_list, super().forward(x), strict=True))
        assert self._seen is not None
        found[SPATIAL] = self._seen.permute(0, 2, 3, 1).flatten(1).float()
        self._seen = None
        return tuple(found[layer] for layer in self.asked)

    def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(self.asked, features, strict=True))

    def _see(self, _module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
        self._seen = output[:, :SPATIAL_CHANNELS]


if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR, InceptionExtractor)


class InceptionMetric(Metric):
    """FID, sFID, KID, precision, recall and inception score on torch-fidelity's port of TensorFlow's Inception.

    Args:
        weights: torch-fidelity's weights file; None lets torch-fidelity download it (91 MB).
        statistics: see `Metric`.

    Raises:
        ConfigError: a weights file that is missing or foreign, or a download that fails.
    """

    feature_layer, logits_layer, spatial_layer = "2048", "logits_unbiased", SPATIAL
    biased_below = 10_000

    def __init__(self, weights: str | None = None, **statistics: Any) -> None:
        super().__init__(**statistics)
        self.weights = weights

    def label(self, data: FlowDataModule | None) -> str:
        return "FID"

    def extractor(self, data: FlowDataModule | None) -> FeatureExtractorBase:
        path = self._checked_weights()
        try:
            return create_feature_extractor(
                EXTRACTOR,
                [self.feature_layer, self.logits_layer, SPATIAL],
                cuda=False,
                verbose=False,
                feature_extractor_weights_path=path,
            )
        except OSError as error:  # urllib's errors are OSErrors
            raise ConfigError(
                f"Inception's weights could not be downloaded ({error}): fetch {WEIGHTS} from torch-fidelity's release "
                "v0.2.0 by hand and add metric.weights=FILE."
            ) from error
        except RuntimeError as error:
            raise ConfigError(self._foreign("its tensors have other names or shapes")) from error

    def prepare(self, image: Tensor) -> Tensor:
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image

    def _checked_weights(self) -> str | None:
        """The file's path, if it is one: torch-fidelity itself would unpickle whatever the file holds."""
        if self.weights is None:
            return None
        path = Path(self.weights).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"There is no weights file {path}: set metric.weights=FILE to torch-fidelity's {WEIGHTS}, or leave "
                "metric.weights out to download it."
            )
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ConfigError(self._foreign("it is not a file of tensors")) from error
        return str(path)

    def _foreign(self, why: str) -> str:
        return f"{self.weights} does not hold Inception's weights ({why}): set metric.weights=FILE to {WEIGHTS}."
