"""Within tests, each text of a configuration file is parsed once, and a program composes once.

Composing is much of what a small run costs. What was parsed is kept by its text, so that a file that has changed is
parsed again and a copy of the configuration elsewhere need not be; whoever asks gets a copy of their own. The warm
start (start.py) knows the files of this checkout before it forks.

Hydra composes twice per program, first only to see whether `hydra.mode` is set. In tests it is not, unless the command
line says so (where a file sets it to MULTIRUN, Hydra ends with an AssertionError).

What choices are known is worked out by Hydra for every file with a defaults list; it is only asked for where one of the
list's entries is an interpolation.

For each question that it has for the files, also those of `--help`, Hydra copies its repository of them to the last
bit, because it will look for other files than the original; the list of where to look is all that changes.

What an interpolation says is read by a grammar, and once for the same text.

Entry points, through which plugins and callbacks are found, are read once per installed package: there are three
hundred of them, and a program asks three times.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from importlib.metadata import Distribution, EntryPoints, PathDistribution, distributions
from pathlib import Path
from typing import Any

import hydra
from hydra._internal import defaults_list
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf, grammar_parser

CONF = Path(__file__).parents[2] / "conf"

_load = OmegaConf.load
_get_mode = Hydra.get_mode
_create_interpolation_map = defaults_list._create_interpolation_map
_parse = grammar_parser.parse
_read_entry_points = Distribution.entry_points.fget  # type: ignore[attr-defined]
_known: dict[str, bytes] = {}
_parsed: dict[tuple[str, str, str], Any] = {}
_installed: dict[str, EntryPoints] = {}


def _load_once(file: Any) -> Any:
    if not isinstance(file, io.TextIOWrapper) or file.tell():  # Hydra opens its files itself
        return _load(file)
    text = file.read()
    if text not in _known:
        file.seek(0)  # an error of the parser names the file
        _known[text] = pickle.dumps(_load(file), pickle.HIGHEST_PROTOCOL)
    return pickle.loads(_known[text])


def _get_mode_if_any(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    return _get_mode(self, config_name, overrides) if any("mode" in override for override in overrides) else None


def _interpolation_map_if_any(overrides: Any, entries: list[Any], self_added: bool) -> Any:
    asked = any(entry.is_interpolation() for entry in entries)
    return _create_interpolation_map(overrides, entries, self_added) if asked else None


def _parse_once(value: str, parser_rule: str = "configValue", lexer_mode: str = "DEFAULT_MODE") -> Any:
    key = (value, parser_rule, lexer_mode)
    if key not in _parsed:
        _parsed[key] = _parse(*key)
    return _parsed[key]


def _beside(self: CachingConfigRepository, delegate: IConfigRepository) -> None:
    self.delegate, self.cache = copy.copy(delegate), {}


def _entry_points(package: Distribution) -> Any:
    known = _installed.get(str(package._path)) if isinstance(package, PathDistribution) else None
    return _read_entry_points(package) if known is None else known


def compose_once() -> None:
    """From now on, in this process."""
    for package in distributions():
        if isinstance(package, PathDistribution):
            _installed[str(package._path)] = package.entry_points
    Distribution.entry_points = property(_entry_points)  # type: ignore[method-assign, assignment]
    OmegaConf.load = staticmethod(_load_once)  # type: ignore[method-assign]
    Hydra.get_mode = _get_mode_if_any  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = _interpolation_map_if_any
    CachingConfigRepository.__init__ = _beside  # type: ignore[method-assign]
    for name, module in list(sys.modules.items()):
        if name.startswith("omegaconf") and vars(module).get("parse") is _parse:
            module.parse = _parse_once  # type: ignore[attr-defined]


def know_all() -> None:
    """The files of this checkout and Hydra's own, its plugins, and the grammars of overrides and interpolations."""
    for folder in (CONF, Path(hydra.__file__).with_name("conf")):
        for path in folder.rglob("*.yaml"):
            with path.open(encoding="utf-8") as file:
                _parse_all(OmegaConf.to_container(_load_once(file)))
    Plugins.instance()
    OverridesParser.create().parse_overrides(["a=1", "+a.b=[x,1.5]", "++a={b:null,c:'d e'}", "~a", "a@b=c/d", "a=b,c"])
    assert OmegaConf.create({"a": "${b.c}-${oc.env:HOME,x}", "b": {"c": 1}}).a


def _parse_all(value: Any) -> None:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _parse_all(part)
    elif isinstance(value, str) and "${" in value:
        _parse_once(value)


def forget_plugins(paths: list[str]) -> None:
    """Where one of these folders has plugins of Hydra, they are looked for anew."""
    if any((Path(path) / "hydra_plugins").exists() for path in paths):
        Singleton._instances.pop(Plugins, None)
