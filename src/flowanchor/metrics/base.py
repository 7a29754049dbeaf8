"""What a metric is: a feature extractor of torch-fidelity, and what its numbers are called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from flowanchor.data.base import FlowDataModule

LAYERS = ("64", "logits")


class SmallExtractor(FeatureExtractorBase):
    """An extractor of ours as torch-fidelity wants one: layers `64` (penultimate) and `logits`."""

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return LAYERS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYERS[metric == "isc"]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def chosen(self, features: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        """Those of the two that were asked for."""
        found = dict(zip(LAYERS, (features, logits), strict=True))
        return tuple(found[layer] for layer in self.features_list)


class Metric(ABC):
    """A way to look at images (the `metric` group).

    Args:
        kid_subsets, kid_subset_size: of the kernel distance; a subset is never larger than half of the smaller set.
        neighborhood: k of the k nearest neighbours of precision and recall.
        isc_splits: parts over which the inception score is averaged; a part never has fewer than 50 samples.
        feature_limit: so many features of each side are kept for the kernel distance, precision and recall.
        cache_dir: where a reference's features are kept; None: nowhere.

    Attributes:
        feature_layer: of the Frechet and kernel distance, precision and recall.
        logits_layer: of the inception score; None where the extractor has none.
        spatial_layer: of the spatial Frechet distance (sFID); None where the extractor has none.
        reads_prompts: it has a CLIP score, `alignment`, of images that were asked for by prompts.
        biased_below: numbers of samples below which the distance is known to mislead; 0: not known.
    """

    feature_layer: str
    logits_layer: str | None
    spatial_layer: str | None = None
    biased_below: int = 0
    reads_prompts: bool = False

    def __init__(
        self,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        neighborhood: int = 3,
        isc_splits: int = 10,
        feature_limit: int = 10_000,
        cache_dir: str | None = None,
    ) -> None:
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        self.neighborhood, self.isc_splits, self.feature_limit = neighborhood, isc_splits, feature_limit
        self.cache_dir = cache_dir

    @abstractmethod
    def label(self, data: FlowDataModule | None) -> str:
        """What the Frechet distance is called. `FID` is reserved for Inception's features."""

    @abstractmethod
    def extractor(self, data: FlowDataModule | None) -> FeatureExtractorBase:
        """torch-fidelity's feature extractor with the layers, ready for images of this data.

        `data` is None where the reference is not the training data (`reference=`): a metric that cannot do without
        raises `ConfigError`.
        """

    def prepare(self, image: Tensor) -> Tensor:
        """A uint8 image [C, H, W] as the extractor wants it."""
        return image

    def alignment(self, images: Tensor, prompts: Sequence[str]) -> float:
        """CLIP score (0 to 100), summed over prepared images [B, 3, H, W], each against its own prompt."""
        raise NotImplementedError(f"{type(self).__name__} reads no prompts")
