"""The configuration of a program without starting it."""

from __future__ import annotations

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flowanchor.base.moved import use_current_names
from flowanchor.errors import ConfigError
from flowanchor.programs.launch import CONFIG_PATH, prepare
from flowanchor.programs.messages import explain
from flowanchor.programs.texts import quoted


def compose(*overrides: str, program: str = "train") -> DictConfig:
    """What `flowanchor PROGRAM OVERRIDES` would run with.

    A run folder belongs to a running program: what refers to it (`${hydra:runtime.output_dir}`) cannot be read here.

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
        return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, program, CONFIG_PATH, words) or str(error)) from error
    finally:
        GlobalHydra.instance().hydra = running


def _apart(text: str) -> list[str]:
    """`"a=1 b=2"` as two; a value with blanks in it stays one."""
    parts = text.split()
    return parts if all("=" in part for part in parts) and not set("'\"[{(") & set(text) else [text]
