from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from flowanchor.metrics.evaluator import Evaluator
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.plugins.metrics.small import SmallMetric


@pytest.fixture(scope="session")
def digits():
    return DigitsDataModule(batch_size=128)


@pytest.fixture(scope="session")
def small_metric(tmp_path_factory):
    return SmallMetric(str(tmp_path_factory.mktemp("classifiers")), steps=80, kid_subset_size=250)


@pytest.fixture(scope="session")
def evaluator(small_metric, digits):
    return Evaluator(small_metric, digits)


@pytest.fixture(scope="session")
def sources():
    """Images and features of known moments, and a metric that looks at pixels alone: sources.py."""
    spec = importlib.util.spec_from_file_location("metric_sources", Path(__file__).with_name("sources.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
