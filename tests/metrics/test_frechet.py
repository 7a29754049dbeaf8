"""Known answers, torch-fidelity's on the same features, and few samples of many features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from flowanchor.metrics.frechet import Gaussian, frechet_distance
from flowanchor.metrics.moments import Moments


def moments(rows, batches=1):
    found = Moments()
    for part in np.array_split(rows, batches):
        found.add(part)
    return found


def with_moments(n, mean, covariance, seed=0):
    """Samples [N, D] whose sample mean and covariance are exactly these."""
    white = np.random.default_rng(seed).standard_normal((n, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def random_covariance(size, seed, rank=None):
    root = np.random.default_rng(seed).standard_normal((size, rank or size + 5))
    return root @ root.T / size


def test_known_answer_of_diagonal_covariances():
    """|m1 - m2|^2 + sum (s1 - s2)^2, by hand, from samples of exactly these moments."""
    first = moments(with_moments(500, np.array([1.0, 0.0, -2.0]), np.diag([4.0, 1.0, 9.0]))).gaussian()
    second = moments(with_moments(300, np.array([0.0, 2.0, -2.0]), np.diag([1.0, 1.0, 16.0]), seed=1)).gaussian()
    assert frechet_distance(first, second) == pytest.approx((1 + 4) + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-10)


def test_known_answer_of_covariances_that_do_not_commute():
    """In two dimensions the root has a closed form: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    product = a @ b
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 0.25 + np.trace(a) + np.trace(b) - 2 * root_trace
    found = frechet_distance(Gaussian(np.zeros(2), a), Gaussian(np.array([0.5, 0.0]), b))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "size"), [(600, 400, 64), (3000, 200, 128)])
def test_equals_torch_fidelity_on_the_same_features(n, m, size):
    generator = np.random.default_rng(size)
    mixing = generator.standard_normal((size, size)) * np.geomspace(1, 0.01, size)
    first = np.maximum(generator.standard_normal((n, size)) @ mixing, 0) + 0.3
    second = np.maximum(1.1 * generator.standard_normal((m, size)) @ mixing, 0)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(f)) for f in (first, second)), verbose=False
    )[KEY_METRIC_FID]
    ours = frechet_distance(moments(first, batches=7).gaussian(), moments(second, batches=3).gaussian())
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_fewer_samples_than_features():
    """Ranks 19 and 29 of 100 against the answer inside the joint range, computed with twice the care."""
    generator = np.random.default_rng(0)
    first, second = 50 * generator.standard_normal((20, 100)), 50 * generator.standard_normal((30, 100))
    a, b = moments(first).gaussian(), moments(second).gaussian()
    found = frechet_distance(a, b)
    # The nuclear norm of the centred samples' cross products: no covariance of rank 100 is ever formed.
    x, y = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (first, second))
    between = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * between
    assert found == pytest.approx(expected, rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-9 * np.trace(a.covariance)


def test_symmetric_zero_and_monotone():
    a, b = (Gaussian(np.full(30, float(i)), random_covariance(30, i, rank=12 + i)) for i in range(2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert abs(frechet_distance(a, a)) < 1e-10
    constant = Gaussian(np.zeros(4), np.zeros((4, 4)))  # every image the same
    assert frechet_distance(constant, Gaussian(np.ones(4), np.eye(4))) == pytest.approx(4 + 4)


def test_features_of_different_sizes():
    with pytest.raises(ValueError, match="30 and 3"):
        frechet_distance(Gaussian(np.zeros(30), np.eye(30)), Gaussian(np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="do not fit"):
        Gaussian(np.zeros(3), np.eye(4))
