"""Against torch-fidelity, which holds all predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from flowanchor.metrics.inception_score import InceptionScore, split_of_each


@pytest.mark.parametrize("splits", [1, 10])
def test_streamed_and_merged_it_is_torch_fidelitys(splits):
    logits = 5 * np.random.default_rng(1).standard_normal((703, 12))
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=splits)
    split = split_of_each(703, splits)
    parts = [InceptionScore(splits) for _ in range(3)]
    for number, start in enumerate(range(0, 703, 50)):
        parts[number % 2].add(split[start : start + 50], logits[start : start + 50])
    merged = parts[2]
    for part in parts[:2]:
        merged.merge(InceptionScore.from_state(part.state()))
    mean, std = merged.score()
    assert mean == pytest.approx(expected[KEY_METRIC_ISC_MEAN], rel=1e-10)
    assert std == pytest.approx(expected[KEY_METRIC_ISC_STD], rel=1e-8, abs=1e-12)


def test_certain_predictions_of_ten_classes_score_ten():
    score = InceptionScore(1)
    score.add(np.zeros(100, dtype=np.uint8), np.tile(np.eye(12)[:10] * 1000, (10, 1)))
    assert score.score()[0] == pytest.approx(10)
