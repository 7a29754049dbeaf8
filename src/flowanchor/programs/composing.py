"""The configuration of a program without starting it."""

from __future__ import annotations

from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowanchor.base.moved import use_current_names
from flowanchor.errors import ConfigError
from flowanchor.programs.folders import UNNAMED
from flowanchor.programs.launch import CONFIG_PATH, prepare
from flowanchor.programs.messages import explain
from flowanchor.programs.texts import quoted

RUN_FOLDER = "${hydra:runtime.output_dir}"


def compose(*overrides: str, program: str = "train") -> DictConfig:
    """What `flowanchor PROGRAM OVERRIDES` would run with.

    Nothing runs, so there is no run folder yet: what lies in it is given as in `outputs/PROGRAM/NAME`.

    Args:
        overrides: as typed: `"experiment=digits_facm"`, `"seed=1"`. One text may hold several, apart by blanks, where
            each of them reads `key=value`.
        program: train, sample, eval, encode, convert, report or demo.

    Raises:
        ConfigError: unknown keys or options, with what was meant.
    """
    words = [word for text in overrides for word in _apart(text)]
    prepare()
    running = GlobalHydra.instance().hydra  # of the program that asks, if one does
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_PATH.removeprefix("pkg://"), version_base="1.3"):
            cfg = hydra_compose(program, quoted(words))
        use_current_names(cfg)
        _name_folder(cfg, f"outputs/{program}/{cfg.get('name') or UNNAMED}")
        return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, program, CONFIG_PATH, words) or str(error)) from error
    finally:
        GlobalHydra.instance().hydra = running


def _name_folder(node: Any, folder: str) -> None:
    """Put a folder in the place of the run's own, which only a running program has."""
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(value, (DictConfig, ListConfig)):
            if not (value._is_none() or value._is_missing() or value._is_interpolation()):
                _name_folder(value, folder)
        elif value is not None and isinstance(value._value(), str) and RUN_FOLDER in value._value():
            node[key] = value._value().replace(RUN_FOLDER, folder)


def _apart(text: str) -> list[str]:
    """`"a=1 b=2"` as two; a value with blanks in it stays one."""
    parts = text.split()
    return parts if all("=" in part for part in parts) and not set("'\"[{(") & set(text) else [text]
