"""Text to image: does a picture show what was asked for, and does it look like the pictures of a reference?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowanchor.data.base import FlowDataModule
from flowanchor.metrics.base import Metric
from flowanchor.plugins.metrics.clip import Clip
from flowanchor.plugins.metrics.inception import InceptionMetric
from flowanchor.plugins.metrics.stock_network import StockExtractor

EXTRACTOR = "flowanchor-clip"
LAYER = "clip"


class ClipExtractor(StockExtractor):
    """CLIP's image embeddings: layer `clip`, [B, D], of length 1."""

    layer = LAYER


if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR, ClipExtractor)


class TextToImageMetric(Metric):
    """CLIP score against the prompts, and distances against a reference folder.

    The distances are of CLIP's image embeddings (`FD-CLIP`), or, with `weights`, of Inception's features (`FID`).

    Args:
        clip: folder of a CLIP in transformers' layout.
        weights: torch-fidelity's file of Inception's weights; None: the distances are CLIP's.
        statistics: see `Metric`.
    """

    reads_prompts = True

    def __init__(self, clip: str | None, weights: str | None = None, **statistics: Any) -> None:
        super().__init__(**statistics)
        self.clip = Clip(clip)
        self._inception = InceptionMetric(weights, **statistics) if weights else None
        if self._inception is None:
            self.feature_layer, self.logits_layer = LAYER, None
        else:
            self.feature_layer, self.logits_layer = self._inception.feature_layer, self._inception.logits_layer
            self.spatial_layer, self.biased_below = self._inception.spatial_layer, self._inception.biased_below

    def label(self, data: FlowDataModule | None) -> str:
        return "FD-CLIP" if self._inception is None else "FID"

    def extractor(self, data: FlowDataModule | None) -> FeatureExtractorBase:
        if self._inception is not None:
            return self._inception.extractor(data)
        return create_feature_extractor(EXTRACTOR, [LAYER], cuda=False, verbose=False, module=self.clip)

    def prepare(self, image: Tensor) -> Tensor:
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image

    @torch.no_grad()
    def alignment(self, images: Tensor, prompts: Sequence[str]) -> float:
        """Sum over uint8 images [B, 3, H, W] of 100 times the cosine between image and prompt, by torchmetrics."""
        from torchmetrics.multimodal import CLIPScore

        metric = CLIPScore(self.clip.pair).to(images.device)
        metric.update(list(images), list(prompts))
        return float(metric.score)
