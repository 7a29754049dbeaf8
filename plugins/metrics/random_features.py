"""A metric that needs neither weights nor labels: fixed random convolutions, to try an evaluation from end to end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowanchor.base.pixels import from_uint8
from flowanchor.data.base import FlowDataModule
from flowanchor.metrics.base import LAYERS, Metric, SmallExtractor

EXTRACTOR = "flowanchor-random"
FEATURES, CLASSES = 64, 16
WIDTHS = (3, 16, 32, FEATURES // 4)  # the last one on a grid of 2 x 2


class RandomExtractor(SmallExtractor):
    """Three convolutions of stride 2 with orthogonal weights drawn from a seed: layers `64` and `logits`.

    `forward`: uint8 [B, 3, H, W] of any size -> (features [B, 64], logits [B, 16]).
    """

    def __init__(self, name: str, features_list: list[str], seed: int = 0, **_: Any) -> None:
        super().__init__(name, features_list)
        layers: list[nn.Module] = []
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # the layers draw weights of their own first
            for channels, width in zip(WIDTHS, WIDTHS[1:], strict=False):
                layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.LeakyReLU(0.2)]
            self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
            self.logits = nn.Linear(FEATURES, CLASSES, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(module.weight, gain=2.0, generator=generator)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.convolutions(from_uint8(images))
        return self.chosen(features, self.logits(functional.relu(features)))


if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR, RandomExtractor)


class RandomMetric(Metric):
    """`FD-random`: tells images apart, but its numbers mean nothing. For tests of the program and first tries.

    Args:
        seed: of the weights: scores of two seeds cannot be compared.
        statistics: see `Metric`.
    """

    feature_layer, logits_layer = LAYERS

    def __init__(self, seed: int = 0, **statistics: Any) -> None:
        super().__init__(**statistics)
        self.seed = seed

    def label(self, data: FlowDataModule | None) -> str:
        return "FD-random"

    def extractor(self, data: FlowDataModule | None) -> SmallExtractor:
        return create_feature_extractor(EXTRACTOR, list(LAYERS), cuda=False, verbose=False, seed=self.seed)

    def prepare(self, image: Tensor) -> Tensor:
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image
