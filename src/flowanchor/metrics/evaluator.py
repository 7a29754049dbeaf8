"""Scores of a set of images against a reference, and the floor below which no score means anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from flowanchor.base.typed import instantiate
from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError
from flowanchor.metrics.base import Metric
from flowanchor.metrics.collected import Collected, Layers, Wanted
from flowanchor.metrics.frechet import frechet_distance
from flowanchor.metrics.reference import TrainSplit
from flowanchor.metrics.reference_base import Reference
from flowanchor.metrics.reference_features import ReferenceFeatures, cached_features

PRC_BATCH = 2000  # rows of the distance matrix at once
MIN_ISC_SPLIT = 50


@dataclass(frozen=True)
class Scores:
    """Numbers of one set of images against the reference; None: the reference does not have what they need."""

    n: int
    fd: float  # Frechet distance, squared, as usual
    sfid: float | None  # the same of spatial features
    kid: float | None  # kernel distance: mean over the subsets
    kid_std: float | None
    precision: float | None
    recall: float | None
    features_n: int  # images whose features entered kernel distance, precision and recall
    inception_score: float | None
    inception_score_std: float | None
    clip_score: float | None = None  # 100 times the mean cosine of image and prompt, 0 at least

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


class Evaluator:
    """Measures images with one metric against one reference.

        evaluator = Evaluator(metric, data)
        print(evaluator.score(images).fd, evaluator.floor(1000).fd)

    Images are looked at batch by batch and let go; the reference is looked at once, and kept in the metric's cache.

    Args:
        metric: a `Metric`, or the config of one.
        data: where the floor, and without `reference` the reference, come from.
        device: where the extractor runs ("cpu", "cuda").
        batch_size: images per call of the extractor.
        reference: what to compare with; None: the data's train split.
    """

    def __init__(
        self,
        metric: Metric | Mapping[str, Any],
        data: FlowDataModule | None,
        device: str = "cpu",
        batch_size: int = 250,
        reference: Reference | None = None,
    ) -> None:
        self.metric: Metric = metric if isinstance(metric, Metric) else instantiate(metric)
        self.data, self.device, self.batch_size = data, device, batch_size
        self.label = self.metric.label(data)
        self._extractor = self.metric.extractor(data).to(device).eval()
        if reference is None:
            if data is None:
                raise ConfigError("Nothing to compare with: add reference=FOLDER or reference=FILE.npz.")
            reference = TrainSplit(data)
        self.source = reference

    @cached_property
    def extractor_digest(self) -> str:
        """Hash (hex) of the extractor's name, layers and weights."""
        found = hashlib.sha256(repr((self._extractor.get_name(), self._layers)).encode())
        for name, value in sorted(self._extractor.state_dict().items()):
            found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def extractor_name(self) -> str:
        """What torch-fidelity calls it."""
        return self._extractor.get_name()

    @property
    def _layers(self) -> list[str]:
        metric = self.metric
        return [name for name in (metric.feature_layer, metric.logits_layer, metric.spatial_layer) if name is not None]

    @cached_property
    def reference(self) -> ReferenceFeatures:
        """What the scores need of the reference."""
        return cached_features(self)

    # ------------------------------------------------------------------------------------------------------- looking

    @torch.no_grad()
    def look(self, images: Tensor, prompts: Sequence[str] | None = None) -> Layers:
        """What the extractor gives for uint8 images [B, C, H, W], and how well they fit their prompts, where given."""
        prepared = torch.stack([self.metric.prepare(image) for image in images]).to(self.device)
        found = self._extractor.convert_features_tuple_to_dict(self._extractor(prepared))
        layers = {name: found[name].float().cpu().numpy() for name in self._layers}
        metric = self.metric
        return Layers(
            layers[metric.feature_layer],
            None if metric.logits_layer is None else layers[metric.logits_layer],
            None if metric.spatial_layer is None else layers[metric.spatial_layer],
            metric.alignment(prepared, prompts) if metric.reads_prompts and prompts is not None else None,
        )

    def wanted(self, n: int, prefix: int | None = None) -> Wanted:
        """What to collect of n images; `prefix`: the distance of the first so many is asked for as well."""
        splits = 0 if self.metric.logits_layer is None else max(1, min(self.metric.isc_splits, n // MIN_ISC_SPLIT))
        return Wanted(n, splits, None if prefix == n else prefix, self.metric.feature_limit)

    def collect(self, chunks: Iterable[Tensor], wanted: Wanted) -> Collected:
        """Look at all images, chunks uint8 [b, C, H, W] in order; raises `ConfigError` where there are fewer."""
        found, position = Collected(wanted), 0
        for chunk in chunks:
            found.add(position, self.look(chunk))
            position += len(chunk)
        return found

    def measure(self, images: Dataset[Tensor], prefix: int | None = None) -> Collected:
        """As `collect`, for a dataset of uint8 images [C, H, W], read once and in order."""
        n = len(cast(Sized, images))
        return self.collect(batches(images, self.batch_size), self.wanted(n, prefix))

    # ------------------------------------------------------------------------------------------------------- scoring

    def score(self, images: Dataset[Tensor]) -> Scores:
        """Scores of a dataset of uint8 images [C, H, W] against the reference."""
        return self.score_collected(self.measure(images))

    def score_collected(self, found: Collected) -> Scores:
        """As `score`, of what was collected; raises `ConfigError` for fewer images than a score needs."""
        metric, reference = self.metric, self.reference
        smaller = min(found.n, found.n if reference.kept is None else len(reference.kept))
        if smaller <= metric.neighborhood + 1:
            raise ConfigError(
                f"{found.n} samples against {reference.n or 'statistics'} are too few for a score: use "
                f"num_samples=1000 and a reference of as many (at least {metric.neighborhood + 2})."
            )
        spatial = None
        if reference.spatial is not None and found.spatial.n:
            spatial = frechet_distance(found.spatial.gaussian(), reference.spatial)
        inception_score, inception_score_std = found.predictions.score() if found.wanted.splits else (None, None)
        return Scores(
            n=found.n,
            fd=frechet_distance(found.features.gaussian(), reference.features),
            sfid=spatial,
            **self._of_kept(found),
            inception_score=inception_score,
            inception_score_std=inception_score_std,
            clip_score=max(found.alignment / found.aligned, 0.0) if found.aligned else None,
        )

    def _of_kept(self, found: Collected) -> dict[str, Any]:
        metric, kept = self.metric, found.kept_features()
        if self.reference.kept is None:
            return dict.fromkeys(("kid", "kid_std", "precision", "recall"), None) | {"features_n": len(kept)}
        ours, theirs = torch.from_numpy(kept), torch.from_numpy(self.reference.kept)
        subset = min(metric.kid_subset_size, min(len(ours), len(theirs)) // 2)
        kid = kid_features_to_metric(
            ours.double(), theirs.double(), kid_subsets=metric.kid_subsets, kid_subset_size=subset, verbose=False
        )
        near = prc_features_to_metric(
            ours,
            theirs,
            prc_neighborhood=metric.neighborhood,
            prc_batch_size=PRC_BATCH,
            save_cpu_ram=True,
            verbose=False,
        )
        return {
            "kid": kid[KEY_METRIC_KID_MEAN],
            "kid_std": kid[KEY_METRIC_KID_STD],
            "precision": near[KEY_METRIC_PRECISION],
            "recall": near[KEY_METRIC_RECALL],
            "features_n": len(kept),
        }

    def frechet_of_prefix(self, found: Collected) -> float:
        """Frechet distance of the first images alone, as many as were wanted."""
        moments = found.features if found.wanted.prefix is None else found.prefix
        return frechet_distance(moments.gaussian(), self.reference.features)

    # --------------------------------------------------------------------------------------------------------- floor

    def floor_size(self, num_samples: int) -> int | None:
        """At how many images the floor of a score at `num_samples` is taken: as many, or all that are held out.

        None where the reference is not the training data, so that nothing is known to be held out, and where fewer are
        held out than a score needs.
        """
        held = self.heldout
        return None if held is None or held < self.metric.neighborhood + 2 else min(num_samples, held)

    @property
    def heldout(self) -> int | None:
        """How many images of the data are held out; None where the reference is not the training data."""
        if self.data is None or not isinstance(self.source, TrainSplit):
            return None
        return len(self.data.images("heldout"))

    def floor(self, num_samples: int) -> Scores:
        """Real against real: scores of `floor_size(num_samples)` held-out images."""
        size = self.floor_size(num_samples)
        if self.data is None or size is None:
            raise ConfigError("A floor needs held-out images: leave reference out to compare with the training data.")
        return self.score(self.data.images("heldout").subset(range(size)))


def batches(images: Dataset[Tensor], batch_size: int) -> Iterator[Tensor]:
    """A dataset as batches in order."""
    n = len(cast(Sized, images))
    for start in range(0, n, batch_size):
        yield torch.stack([images[index] for index in range(start, min(start + batch_size, n))])
