"""A run that is composed once has the configuration that Hydra gives it; what is no plain run is composed as ever."""

from __future__ import annotations

from typing import Any

import pytest
from hydra._internal import hydra as internal
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from flowanchor.programs.composing import composed_once
from flowanchor.programs.launch import prepare


def made() -> Any:
    GlobalHydra.instance().clear()
    search = create_automatic_config_search_path(None, None, "pkg://flowanchor.conf")
    return internal.Hydra.create_main_hydra2(task_name="train", config_search_path=search)


@pytest.fixture
def count(monkeypatch):
    """How often a configuration is composed."""
    calls: list[int] = []
    compose = ConfigLoaderImpl._load_configuration_impl
    monkeypatch.setattr(
        ConfigLoaderImpl, "_load_configuration_impl", lambda *a, **k: calls.append(1) or compose(*a, **k)
    )
    yield calls
    GlobalHydra.instance().clear()


def as_hydra_does(words: list[str]) -> tuple[Any, str]:
    """The mode, and what a run is composed of (hydra._internal.utils._run_app)."""
    prepare()
    hydra, words = made(), list(words)
    mode = hydra.get_mode(config_name="train", overrides=words)
    if mode is None:
        words.append("hydra.mode=RUN")
    cfg = hydra.compose_config(config_name="train", overrides=words, run_mode=RunMode.RUN)
    return mode, OmegaConf.to_yaml(cfg, resolve=False)


@pytest.mark.parametrize(
    "words",
    [[], ["experiment=digits_teacher", "hydra.run.dir=x", "+a.b=1", "~logger"], ["hydra.mode=RUN", "seed=3"]],
    ids=" ".join,
)
def test_the_same_configuration_composed_once(count, words):
    wanted = as_hydra_does(words)
    assert len(count) == 2
    with composed_once():
        assert as_hydra_does(words) == wanted
    assert len(count) == 3 and internal.Hydra is not type(GlobalHydra.instance().hydra)


def test_other_words_and_sweeps_are_composed_anew(count):
    with composed_once():
        hydra = made()
        assert hydra.get_mode("train", ["hydra.mode=MULTIRUN"]) == RunMode.MULTIRUN
        assert hydra.get_mode("train", ["seed=1,2"]) is None, "a sweep has no mode of its own"
        hydra.get_mode("train", ["seed=1"])
        count.clear()
        for words, mode in ((["seed=2"], RunMode.RUN), (["seed=1"], RunMode.MULTIRUN), (["seed=1"], RunMode.RUN)):
            assert str(hydra.compose_config("train", words, mode).seed) == words[0][-1]
        assert len(count) == 3, "what is kept is for the next that is asked for alone"
        with pytest.raises(Exception, match="seed"):
            hydra.compose_config("train", ["seed=1,2"], RunMode.RUN)
    assert type(made()) is internal.Hydra
