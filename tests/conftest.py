"""What every test shares: tests that need a GPU are skipped where there is none."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flowanchor.base.rank_zero import rank_zero_only

TRAINING = Path(__file__).parent / "strategies" / "training.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make gpu-check"))


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """Whoever starts the tests in the background, or by nohup, has them ignore Ctrl-C and a closed terminal, and with
    them every program that they start; programs respect that, and some tests send just these signals."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def still_the_first_process() -> Iterator[None]:
    """A test that plays another process must not leave its number behind: whatever writes files later would not."""
    yield
    rank, rank_zero_only.rank = rank_zero_only.rank, 0
    assert rank == 0, "this test left a process number behind in rank_zero_only.rank"


def _same(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), (where, ours.keys() ^ theirs.keys())
        for key in ours:
            _same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            _same(*pair, f"{where}[{i}]")
    else:
        assert ours == theirs, where


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """`assert_same(ours, theirs, where)`: two checkpoints, or parts of them, bit for bit."""
    return _same


@pytest.fixture(scope="session")
def training() -> ModuleType:
    """Small runs in this process (tests/strategies/training.py)."""
    spec = importlib.util.spec_from_file_location("strategy_training", TRAINING)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["strategy_training"] = module
    spec.loader.exec_module(module)
    return module
