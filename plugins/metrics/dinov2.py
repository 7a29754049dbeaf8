"""Frechet distance of DINOv2's features: a second opinion beside Inception's, which knows ImageNet's classes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowanchor.base.stock_folder import without_code
from flowanchor.data.base import FlowDataModule
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.metrics.base import Metric
from flowanchor.plugins.metrics.stock_network import StockExtractor, read_stock, resized

EXTRACTOR = "flowanchor-dinov2"
LAYER = "cls"
SIDE = 224
# Of ImageNet's pixels in [0, 1], as DINOv2 was trained.
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dinov2(nn.Module):
    """A frozen DINOv2 from a local folder.

    Args:
        folder: `config.json` and safetensors, as transformers' `save_pretrained` writes them.

    Raises:
        ConfigError: no folder, or transformers is missing.
        CheckpointError: a folder that holds no DINOv2.
    """

    def __init__(self, folder: str | Path | None) -> None:
        super().__init__()
        if not folder:
            raise ConfigError(
                "metric=dinov2 needs the weights of DINOv2: add metric.dinov2=FOLDER (docs/evaluation.md)."
            )
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise CheckpointError(f"There is no folder {self.folder} with DINOv2: set metric.dinov2=FOLDER.")
        try:
            from transformers import Dinov2Model  # an extra
        except ImportError as error:
            raise ConfigError("metric=dinov2 needs transformers: pip install 'flowanchor[wan]'.") from error
        kind = without_code(self.folder).get("model_type")
        if kind != "dinov2":
            raise CheckpointError(
                f"{self.folder} holds no DINOv2 (its config.json says {kind}): set metric.dinov2=FOLDER to one, such "
                "as a copy of facebook/dinov2-large."
            )
        network, *_ = read_stock(Dinov2Model, self.folder, "DINOv2")
        self.network: Any = network

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> the class token after the last normalisation, [B, D]."""
        features: Tensor = self.network(pixel_values=prepared(images)).pooler_output
        return features


def prepared(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> [B, 3, 224, 224]: bicubic with antialiasing, in 8 bits as Pillow has it, normalised."""
    mean, spread = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, SPREAD))
    return (resized(images, SIDE).float() / 255 - mean) / spread


class Dinov2Extractor(StockExtractor):
    """Layer `cls`, [B, D]. torch-fidelity's own is fetched as code (torch.hub)."""

    layer = LAYER


if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR, Dinov2Extractor)


class Dinov2Metric(Metric):
    """Frechet distance and others on DINOv2's class token, called `FD-DINOv2` (arXiv 2306.04675).

    Args:
        dinov2: folder of a DINOv2 in transformers' layout. Scores of two sizes of it cannot be compared.
        statistics: see `Metric`.
    """

    feature_layer, logits_layer = LAYER, None
    biased_below = 10_000

    def __init__(self, dinov2: str | None, **statistics: Any) -> None:
        super().__init__(**statistics)
        self.dinov2 = Dinov2(dinov2)

    def label(self, data: FlowDataModule | None) -> str:
        return "FD-DINOv2"

    def extractor(self, data: FlowDataModule | None) -> FeatureExtractorBase:
        return create_feature_extractor(EXTRACTOR, [LAYER], cuda=False, verbose=False, module=self.dinov2)

    def prepare(self, image: Tensor) -> Tensor:
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image
