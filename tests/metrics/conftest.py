from __future__ import annotations

import pytest

from flowanchor.data.digits import DigitsDataModule
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.small import SmallMetric


@pytest.fixture(scope="session")
def digits():
    return DigitsDataModule(batch_size=128)


@pytest.fixture(scope="session")
def small_metric(tmp_path_factory):
    return SmallMetric(str(tmp_path_factory.mktemp("classifiers")), kid_subset_size=250)


@pytest.fixture(scope="session")
def evaluator(small_metric, digits):
    return Evaluator(small_metric, digits)
