"""What every test shares: how it starts interpreters, what is skipped without a GPU."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flowanchor.base.rank_zero import rank_zero_only

HERE = Path(__file__).parent
WARM = "FLOWANCHOR_WARM_PYTHON"  # names the program to start; processes of pytest-xdist inherit it


def load(name: str, path: Path) -> ModuleType:
    """A file of the tests as a module, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COLD = sys.executable
STARTED = pytest.StashKey[Any]()  # the warm start, in the process that began it


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    load("warm_start", HERE / "warm" / "start.py")
    pluginmanager.register(load("cpu_seconds", HERE / "warm" / "cpu_seconds.py"))


def pytest_configure(config: pytest.Config) -> None:
    """One warm start for the whole session, begun by the process that hands out the tests to the others; composing is
    cheaper."""
    config.addinivalue_line(
        "markers", "cold: starts fresh interpreters, not forks of one that has imported the libraries"
    )
    load("warm_configs", HERE / "warm" / "warm_configs.py").compose_once()
    load("cheaper", HERE / "warm" / "cheaper.py").make_cheaper()
    # Otherwise each process that compiles starts others, for kernels of GPUs.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if not torch.cuda.is_available():
        # Otherwise, where Lightning was imported, every operation on fake tensors looks for a driver's library anew.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if WARM not in os.environ and sys.platform == "linux":
        started = config.stash[STARTED] = sys.modules["warm_start"].WarmStart()
        os.environ[WARM] = str(started.python)
        config.add_cleanup(started.close)
        config.add_cleanup(lambda: os.environ.pop(WARM))


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    all_of_them = config.args_source is config.ArgsSource.TESTPATHS and config.getoption("numprocesses", None)
    if all_of_them and STARTED in config.stash:
        config.stash[STARTED].begin()  # the first tests of each process want it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What a test starts as `sys.executable` is warm, unless the test is marked `cold`."""
    sys.executable = COLD if item.get_closest_marker("cold") else os.environ.get(WARM, COLD)
    try:
        return (yield)
    finally:
        sys.executable = COLD


# The files that take longest: they begin first, so that no process is left with one of them when the others are done.
SLOWEST = (
    "test_docs.py", "integration/test_interruption.py", "compatibility/test_matrix.py", "strategies/test_wan.py",
    "strategies/test_sharding.py", "benchmarks/test_gpu_check.py", "graphs/test_trainer.py",
    "plugins/test_diffusers.py", "strategies/test_objectives.py", "strategies/test_chain_jvp.py",
    "integration/test_bad_input.py", "jvp/test_compiled_dual.py", "benchmarks/test_memory_plan.py",
    "integration/test_run_identity.py", "test_recompute.py", "integration/test_resume.py", "graphs/test_contract.py",
    "programs/test_convert_released.py", "programs/test_evaluate.py", "integration/test_wan_recipes.py",
    "jvp/test_engines.py", "plugins/formats/test_wan_pipeline.py", "plugins/test_end_time.py",
    "strategies/test_command_line.py", "integration/test_configs.py", "checkpoints/test_frozen_base.py",
    "strategies/test_recompute.py", "benchmarks/test_evidence.py", "programs/test_launch.py",
    "strategies/test_deferred.py", "plugins/test_wan_lora.py", "plugins/test_lora.py",
    "programs/test_diffusers_folder.py", "strategies/test_watchdog.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {HERE / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(SLOWEST)))
    gc.freeze()  # a million objects of the libraries, which every trainer's gc.collect() would go through
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
    return load("strategy_training", HERE / "strategies" / "training.py")
