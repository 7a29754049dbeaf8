"""What a metric is: a feature extractor of torch-fidelity, and what its numbers are called."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from flowanchor.data.base import FlowDataModule


class Metric(ABC):
    """A way to look at images (the `metric` group).

    Args:
        kid_subsets, kid_subset_size: of the kernel distance; a subset is never larger than half of the smaller set.
        neighborhood: k of the k nearest neighbours of precision and recall.
        isc_splits: parts over which the inception score is averaged; a part never has fewer than 50 samples.
    """

    feature_layer: str  # of the Frechet and kernel distance, precision and recall
    logits_layer: str  # of the inception score

    def __init__(
        self, kid_subsets: int = 100, kid_subset_size: int = 1000, neighborhood: int = 3, isc_splits: int = 10
    ) -> None:
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        self.neighborhood, self.isc_splits = neighborhood, isc_splits

    @abstractmethod
    def label(self, data: FlowDataModule) -> str:
        """What the Frechet distance is called. `FID` is reserved for Inception's features."""

    @abstractmethod
    def extractor(self, data: FlowDataModule) -> FeatureExtractorBase:
        """torch-fidelity's feature extractor with the two layers, ready for images of this data."""

    def prepare(self, image: Tensor) -> Tensor:
        """A uint8 image [C, H, W] as the extractor wants it."""
        return image


class Prepared(Dataset[Tensor]):
    """Images as a metric's extractor wants them, one at a time."""

    def __init__(self, images: Dataset[Tensor], metric: Metric) -> None:
        self.images, self.metric = images, metric

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        return self.metric.prepare(self.images[index])
