"""Known answers, the floor, and that worse images score worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowanchor.data.images import ArrayImages
from flowanchor.errors import ConfigError, DataError
from flowanchor.metrics.evaluator import Evaluator, Features, frechet_distance


def with_moments(n, mean, covariance, seed=0):
    """Samples [N, D] whose sample mean and covariance are exactly these."""
    white = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_gaussians():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2, by hand."""
    first = with_moments(
        500, torch.tensor([1.0, 0.0, -2.0]).double(), torch.diag(torch.tensor([4.0, 1.0, 9.0])).double()
    )
    second = with_moments(
        300, torch.tensor([0.0, 2.0, -2.0]).double(), torch.diag(torch.tensor([1.0, 1.0, 16.0])).double(), seed=1
    )
    expected = (1 + 4 + 0) + ((2 - 1) ** 2 + 0 + (3 - 4) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_rotated_gaussians():
    """Covariances that do not commute, against the matrix square root by an eigendecomposition in numpy."""
    generator = torch.Generator().manual_seed(3)
    roots = [torch.randn(5, 5, generator=generator).double() for _ in range(2)]
    covariances = [root @ root.T + torch.eye(5).double() for root in roots]
    means = [torch.randn(5, generator=generator).double() for _ in range(2)]
    samples = [with_moments(400, m, c, seed=i) for i, (m, c) in enumerate(zip(means, covariances, strict=True))]

    def root_of(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(np.sqrt(values)) @ vectors.T

    a, b = (c.numpy() for c in covariances)
    between = root_of(root_of(a) @ b @ root_of(a))
    expected = float((means[0] - means[1]).square().sum()) + np.trace(a) + np.trace(b) - 2 * np.trace(between)
    assert frechet_distance(*samples) == pytest.approx(expected, rel=1e-8)


def test_scores_on_features_of_known_moments(small_metric, digits):
    evaluator = Evaluator(small_metric, digits)
    covariance = torch.eye(8).double()
    reference = with_moments(600, torch.zeros(8).double(), covariance)
    evaluator._reference = Features(reference, torch.zeros(600, 10))
    shifted = with_moments(600, torch.full((8,), 0.5).double(), covariance, seed=1)
    certain = torch.eye(10).repeat(60, 1) * 100  # ten classes, each certain, in equal numbers
    scores = evaluator.score_features(Features(shifted, certain))
    assert scores.fd == pytest.approx(8 * 0.25, rel=1e-9)
    assert scores.inception_score == pytest.approx(10, rel=0.1) and scores.inception_score <= 10
    # The polynomial kernel distance of two normal distributions is the squared distance of their moments up to order 3;
    # its leading part, 3 (m.m / d) + ..., is positive and far above the spread of the subsets.
    assert scores.kid > 3 * 0.25 and scores.kid > 3 * scores.kid_std


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


def test_frechet_at_a_smaller_n(evaluator, digits):
    images = digits.images("heldout")
    found = evaluator.features(images)
    assert evaluator.frechet_at(found, 100) == pytest.approx(evaluator.score(images.subset(range(100))).fd)


def test_metric_may_be_a_config(small_metric, digits):
    config = {"_target_": "flowanchor.metrics.small.SmallMetric", "cache_dir": small_metric.cache_dir}
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
