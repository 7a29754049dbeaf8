"""A run is composed once.

Hydra composes the configuration of a single run twice, at first only to see whether a file sets `hydra.mode`. Here the
run takes what was composed then, so that it begins some tenths of a second earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal import hydra as internal
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

IS_RUN = "hydra.mode=RUN"  # which Hydra adds to the overrides of a run whose files set no mode


class _Loader(ConfigLoaderImpl):
    """Gives out once more what it has composed for a run."""

    composed: tuple[str | None, list[str], DictConfig] | None = None

    def compose_run(self, config_name: str | None, overrides: list[str]) -> DictConfig:
        """As for a run; raises what that would."""
        self.composed = None
        cfg = super().load_configuration(config_name, overrides, RunMode.RUN)
        self.composed = config_name, list(overrides), cfg
        return cfg

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *rest: Any, **settings: Any
    ) -> DictConfig:
        known, self.composed = self.composed, None
        if known is not None and run_mode == RunMode.RUN and not (rest or settings.get("from_shell") is False):
            name, before, cfg = known
            if (config_name, overrides) == (name, before):
                return cfg
            if (config_name, overrides) == (name, [*before, IS_RUN]):
                cfg.hydra.mode = RunMode.RUN
                cfg.hydra.overrides.hydra.append(IS_RUN)
                return cfg
        return super().load_configuration(config_name, overrides, run_mode, *rest, **settings)


class _Hydra(internal.Hydra):
    config_loader: _Loader

    @classmethod
    def create_main_hydra2(cls, task_name: str, config_search_path: ConfigSearchPath) -> _Hydra:
        made = cls(task_name=task_name, config_loader=_Loader(config_search_path))
        GlobalHydra.instance().initialize(made)
        return made

    def get_mode(self, config_name: str | None, overrides: list[str]) -> Any:
        try:
            return self.config_loader.compose_run(config_name, overrides).hydra.mode
        except Exception:  # of a sweep, or a mistake, which is told when the run is composed
            return super().get_mode(config_name, overrides)


@contextmanager
def composed_once() -> Iterator[None]:
    """Within it `hydra.main` composes a run once."""
    own = internal.Hydra
    internal.Hydra = _Hydra  # type: ignore[misc]
    try:
        yield
    finally:
        internal.Hydra = own  # type: ignore[misc]
