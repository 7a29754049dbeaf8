from __future__ import annotations

import numpy as np
import pytest

from flowanchor.metrics.moments import Moments


def rows_far_from_zero(n=500, size=6):
    generator = np.random.default_rng(0)
    return 1e6 + generator.standard_normal((n, size)) @ generator.standard_normal((size, size))


def test_batches_give_the_moments_of_everything_even_far_from_zero():
    rows = rows_far_from_zero()
    found = Moments()
    for start in range(0, 500, 64):
        found.add(rows[start : start + 64])
    gaussian = found.gaussian()
    assert found.n == 500
    np.testing.assert_allclose(gaussian.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(gaussian.covariance, np.cov(rows.T), rtol=1e-8)


def test_merged_parts_in_any_order_and_through_their_states():
    rows = rows_far_from_zero()
    whole = Moments()
    whole.add(rows)
    parts = []
    for part in np.array_split(rows, 3):
        moments = Moments()
        moments.add(part)
        parts.append(Moments.from_state(moments.state()))
    merged = Moments()
    for part in (parts[2], Moments(), parts[0], parts[1]):
        merged.merge(part)
    assert merged.n == 500
    np.testing.assert_allclose(merged.gaussian().covariance, whole.gaussian().covariance, rtol=1e-8)
    before = merged.scatter.copy()
    parts[2].add(rows)  # a merged part is not shared
    np.testing.assert_array_equal(merged.scatter, before)


def test_one_row_has_no_covariance():
    moments = Moments()
    moments.add(np.ones((1, 3)))
    with pytest.raises(ValueError, match="1 rows"):
        moments.gaussian()
