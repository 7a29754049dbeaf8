"""Known answers, the floor, and that worse images score worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowanchor.data.base import FlowDataModule
from flowanchor.data.images import ArrayImages
from flowanchor.errors import ConfigError, DataError
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.reference import TrainSplit


def test_scores_on_features_of_known_moments(small_metric, digits, sources):
    evaluator = Evaluator(small_metric, digits)
    wanted = evaluator.wanted(600)
    reference = sources.with_moments(600, np.zeros(8), np.eye(8))
    evaluator.reference = sources.as_reference(sources.collected(wanted, reference, np.zeros((600, 10))))
    shifted = sources.with_moments(600, np.full(8, 0.5), np.eye(8), seed=1)
    certain = np.tile(np.eye(10), (60, 1)) * 100  # ten classes, each certain, in equal numbers
    scores = evaluator.score_collected(sources.collected(wanted, shifted, certain))
    assert scores.fd == pytest.approx(8 * 0.25, rel=1e-9)
    assert scores.inception_score == pytest.approx(10, rel=0.1) and scores.inception_score <= 10
    assert scores.sfid is None and scores.features_n == 600
    # The polynomial kernel distance of two normal distributions is the squared distance of their moments up to order 3;
    # its leading part, 3 (m.m / d) + ..., is positive and far above the spread of the subsets.
    assert scores.kid > 3 * 0.25 and scores.kid > 3 * scores.kid_std


def test_scores_are_torch_fidelitys_on_the_same_images(sources):
    """FID, KID, inception score, precision and recall by its own functions, on features that it holds all at once."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    data = pixels_data(sources, 300, 50)
    evaluator = Evaluator(sources.PixelMetric(), data, batch_size=64)
    images = sources.noisy_images(210, seed=5) // 2 + 30
    scores = evaluator.score(ArrayImages(images, None))
    extractor = sources.PixelExtractor()
    (ours, logits, corner), (theirs, _, their_corner) = (
        extractor(x) for x in (images, data.images("train").stack(range(300)))
    )

    def distance(first, second):
        both = [fid_features_to_statistics(features.double()) for features in (first, second)]
        return fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]

    assert scores.fd == pytest.approx(distance(ours, theirs), rel=1e-6)
    assert scores.sfid == pytest.approx(distance(corner, their_corner), rel=1e-6)
    inception = isc_features_to_metric(logits, splits=4)
    assert scores.inception_score == pytest.approx(inception["inception_score_mean"], rel=1e-6)
    assert scores.inception_score_std == pytest.approx(inception["inception_score_std"], rel=1e-4)
    kid = kid_features_to_metric(ours, theirs, kid_subsets=100, kid_subset_size=20, verbose=False)
    assert scores.kid == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-5)
    near = prc_features_to_metric(ours.float(), theirs.float(), prc_neighborhood=3, prc_batch_size=100,
                                  save_cpu_ram=True, verbose=False)  # fmt: skip
    assert (scores.precision, scores.recall) == (pytest.approx(near["precision"]), pytest.approx(near["recall"]))
    assert 0 < scores.precision < 1 or 0 < scores.recall < 1


def pixels_data(sources, train, heldout):
    class Pixels(FlowDataModule):
        name, channels, size, num_classes = "pixels", 3, 8, 0

        def load(self):
            counts = {"train": train, "heldout": heldout}
            return {k: ArrayImages(sources.noisy_images(n, seed=i), None) for i, (k, n) in enumerate(counts.items())}

    return Pixels(batch_size=8)


def test_kept_features_are_bounded_and_drawn_from_all_images(sources):
    evaluator = Evaluator(sources.PixelMetric(feature_limit=100), pixels_data(sources, 300, 400), batch_size=50)
    images = evaluator.data.images("heldout")
    found = evaluator.measure(images)
    everything = Evaluator(sources.PixelMetric(), evaluator.data).measure(images).kept_features()
    kept = found.kept_features()
    places = [int(np.flatnonzero((everything == row).all(1))[0]) for row in kept]
    assert len(kept) == 100 and places == sorted(places) and places[49] > 150 and places[-1] > 350
    assert evaluator.score_collected(found).features_n == 100 and evaluator.reference.kept.shape == (100, 12)
    np.testing.assert_allclose(found.features.gaussian().mean, everything.mean(0), rtol=1e-5)  # of all 400


@pytest.mark.parametrize("place", ["features", "logits"])
def test_features_that_are_not_finite_are_named(sources, monkeypatch, place):
    evaluator = Evaluator(sources.PixelMetric(), pixels_data(sources, 100, 50), batch_size=20)
    look = Evaluator.look

    def broken(self, images):
        layers = look(self, images)
        if len(images) == 10:  # the last batch of the held-out images
            getattr(layers, place)[7, 1] = np.nan
        return layers

    monkeypatch.setattr(Evaluator, "look", broken)
    with pytest.raises(DataError, match="image 47 are not finite"):
        evaluator.floor(50)


def test_a_set_against_itself(evaluator, digits):
    scores = evaluator.score(digits.images("train"))
    assert abs(scores.fd) < 1e-6 and scores.kid < scores.kid_std
    assert scores.precision == scores.recall == 1


def test_floor_uses_the_heldout_images(evaluator, digits):
    floor = evaluator.floor(1000)
    assert floor.n == 500 and evaluator.floor(200).n == 200
    assert floor.fd == pytest.approx(evaluator.score(digits.images("heldout")).fd)
    assert 0.1 < floor.fd < evaluator.floor(100).fd  # fewer samples, larger distance: that is why n is reported
    assert floor.precision > 0.8 and floor.recall > 0.8 and floor.inception_score > 7


def test_worse_images_score_worse(evaluator, digits):
    heldout = digits.images("heldout")
    clean = heldout.stack(range(500))
    generator = torch.Generator().manual_seed(0)
    scores = [evaluator.floor(500)]
    for strength in (40, 120):
        noise = strength * torch.randn(clean.shape, generator=generator)
        noisy = (clean + noise).round().clamp(0, 255).to(torch.uint8)
        scores.append(evaluator.score(ArrayImages(noisy, None)))
    random = torch.randint(0, 256, clean.shape, dtype=torch.uint8, generator=generator)
    scores.append(evaluator.score(ArrayImages(random, None)))
    for better, worse in zip(scores, scores[1:], strict=False):
        assert worse.fd > 1.5 * better.fd and worse.kid > better.kid
        assert worse.precision < better.precision and worse.inception_score < better.inception_score
    assert scores[-1].fd > 50 * scores[0].fd


def test_one_class_alone_loses_recall(evaluator, digits):
    train = digits.images("train")
    ones = evaluator.score(train.subset(np.flatnonzero(train.labels == 1)))
    assert ones.recall < 0.3 < 0.9 < ones.precision and ones.inception_score < 1.5


def test_frechet_of_the_first_images(evaluator, digits):
    images = digits.images("heldout")
    found = evaluator.measure(images, prefix=130)  # ends inside a batch
    assert evaluator.frechet_of_prefix(found) == pytest.approx(evaluator.score(images.subset(range(130))).fd)
    assert evaluator.score_collected(found).fd == pytest.approx(evaluator.score(images).fd)


def test_no_floor_without_the_training_data(sources, tmp_path):
    reference = TrainSplit(pixels_data(sources, 100, 50))
    evaluator = Evaluator(sources.PixelMetric(), None, reference=reference)
    assert evaluator.floor_size(50) is None
    with pytest.raises(ConfigError, match="leave reference out"):
        evaluator.floor(50)
    with pytest.raises(ConfigError, match="reference=FOLDER"):
        Evaluator(sources.PixelMetric(), None)


def test_metric_may_be_a_config(small_metric, digits):
    settings = {"cache_dir": small_metric.classifier_dir, "steps": small_metric.steps}
    config = {"_target_": "flowanchor.plugins.metrics.small.SmallMetric", **settings}
    assert Evaluator(config, digits).label == "FD-digits"


def test_too_few_samples(evaluator, digits):
    with pytest.raises(ConfigError, match="num_samples=1000"):
        evaluator.score(digits.images("heldout").subset(range(3)))


def test_a_classifier_needs_labels(small_metric, digits):
    class Unlabelled(type(digits)):
        def load(self):
            return {k: ArrayImages(v.stack(range(20)), None) for k, v in super().load().items()}

    with pytest.raises(DataError, match="metric=inception"):
        Evaluator(small_metric, Unlabelled(batch_size=4))
