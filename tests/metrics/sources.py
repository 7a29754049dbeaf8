"""Images and features of known moments, and a metric that looks at pixels alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from flowanchor.metrics.base import Metric
from flowanchor.metrics.collected import Collected, Layers
from flowanchor.metrics.reference_features import ReferenceFeatures

LAYERS = ("mean", "logits", "corner")


def with_moments(n, mean, covariance, seed=0):
    """Samples [N, D], float64, whose sample mean and covariance are exactly these."""
    white = np.random.default_rng(seed).standard_normal((n, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def collected(wanted, features, logits, batch=100):
    found = Collected(wanted)
    for start in range(0, len(features), batch):
        part = slice(start, start + batch)
        found.add(start, Layers(features[part], logits[part]))
    return found


def as_reference(found, spatial=None):
    return ReferenceFeatures(found.features.gaussian(), spatial, found.kept_features(), found.n)


class PixelExtractor(FeatureExtractorBase):
    """Layers: mean of each quarter, three numbers as logits, the upper left corner. Counts the images it has seen."""

    def __init__(self, name: str = "pixels", features_list: tuple[str, ...] = LAYERS) -> None:
        super().__init__(name, features_list)
        self.seen = 0

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return LAYERS

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.seen += len(images)
        values = images.double() / 255
        mean = torch.nn.functional.adaptive_avg_pool2d(values, 2).flatten(1)
        return mean, mean[:, :3] * 10, values[:, 0, :2, :2].flatten(1)


class PixelMetric(Metric):
    feature_layer, logits_layer, spatial_layer = LAYERS

    def __init__(self, **settings) -> None:
        super().__init__(**{"kid_subset_size": 20, **settings})
        self.made = PixelExtractor()

    def label(self, data) -> str:
        return "FD-pixels"

    def extractor(self, data) -> PixelExtractor:
        return self.made


def noisy_images(n, side=8, channels=3, seed=0) -> Tensor:
    """uint8 [N, C, H, W] whose quarters differ in brightness, more or less from image to image."""
    generator = torch.Generator().manual_seed(seed)
    quarters = torch.randint(0, 200, (n, channels, 2, 2), generator=generator)
    images = quarters.repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3)
    return (images + torch.randint(0, 55, (n, channels, side, side), generator=generator)).to(torch.uint8)
