"""Errors of Hydra, OmegaConf and the file system as one sentence: what was wrong, where, what to type instead."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from flowanchor.base.causes import chain, unwrapped
from flowanchor.base.typed import misfit
from flowanchor.errors import FlowAnchorError
from flowanchor.programs.rendezvous import trouble
from flowanchor.programs.suspects import blame

_FOLDER_TROUBLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip


def explain(error: BaseException, config_name: str, config_path: str, arguments: list[str]) -> str | None:
    """The sentence for an error that a user can act on; None for one that needs its traceback."""
    error = unwrapped(error)
    for link in chain(error):
        if isinstance(link, FlowAnchorError):
            return _one_line(str(link))
        if isinstance(link, RuntimeError) and "home directory" in str(link):
            return "A path begins with ~, and this user has no home directory: write the whole path."
        apart = trouble(link)
        if apart is not None:
            return apart
    if isinstance(error, MissingConfigException):
        return _missing_option(error, config_name)
    if isinstance(error, OverrideParseException):
        return (
            f"Cannot read the argument '{error.override}': write key=value, a list as 'key=[1,2]', "
            "and text with spaces or commas as 'key=\"some text\"'."
        )
    if isinstance(error, InstantiationException):
        sentence = misfit(error, arguments)
        if sentence is not None:
            return sentence
    for link in chain(error):
        if isinstance(link, MissingMandatoryValue):
            return f"A value for {link.full_key} is required: add {link.full_key}=... to the command."
        if isinstance(link, InterpolationResolutionError):
            return _interpolation(link)
    if isinstance(error, ConfigCompositionException):
        return _composition(error, config_name, config_path, arguments)
    if isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        return _sentence(str(error))
    if isinstance(error, OSError) and error.errno in _FOLDER_TROUBLE:
        return (
            f"Cannot use {error.filename or _output_folder()} ({(error.strerror or 'refused').lower()}): check the "
            "path and its permissions, or write elsewhere with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER with -m)."
        )
    if isinstance(error, ValueError) and str(error).startswith("Only one of --"):
        return f"{_one_line(str(error)).rstrip('.')}: leave all but one of them out."
    emptied = [text for text in arguments if re.fullmatch(r"[^=]+=(null)?", text)]
    if emptied and "Config group override must be a string or a list" in str(error):
        return f"{emptied[0]} chooses no option: write {emptied[0].split('=')[0]}=OPTION (--help lists them)."
    removed = re.search(r"Key '([^']+)' is not in struct", str(error))
    if removed is not None and f"~{removed.group(1)}" in arguments:
        return f"The program cannot do without {removed.group(1)}: leave out ~{removed.group(1)}."
    return blame(error, arguments, lambda overrides: _try_compose(config_name, config_path, overrides))


def nearest(wanted: str, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that `wanted` may have meant, best first; the last part of a dotted key counts too."""
    names = list(dict.fromkeys(known))
    close = get_close_matches(wanted, names, n=3, cutoff=0.75 if len(wanted) > 4 else 0.6)
    if close:  # the best, and those as good: an alternative that is clearly worse only confuses
        scores = [SequenceMatcher(None, name, wanted).ratio() for name in close]
        close = [name for name, score in zip(close, scores, strict=True) if score > scores[0] - 0.03]
    if not close:
        last = wanted.rsplit(".", 1)[-1]
        ends = {name: name.rsplit(".", 1)[-1] for name in names}
        good = get_close_matches(last, list(ends.values()), n=1, cutoff=0.8)
        close = [name for name, end in ends.items() if end in good][:3]
    return close


def _output_folder() -> str:
    """The folder of this run, where it is known already."""
    if not HydraConfig.initialized():
        return "the output folder"
    return f"the output folder {HydraConfig.get().runtime.output_dir}"


def _missing_option(error: MissingConfigException, config_name: str) -> str:
    path = error.missing_cfg_file or ""
    group, _, option = path.rpartition("/")
    if not group:
        return f"There is no configuration '{path or config_name}': {_one_line(str(error))}."
    options = [name.rsplit("/", 1)[-1] for name in error.options or []]
    if not options:
        return f"Unknown option '{option}' for {group}, which has no options at all: check the spelling of {group}."
    close = nearest(option, options)
    hint = f"did you mean {close[0]}? The options are" if close else "choose one of"
    return f"Unknown option '{option}' for {group}: {hint} {', '.join(options)}."


def _composition(error: Exception, config_name: str, config_path: str, arguments: list[str]) -> str:
    text = _one_line(str(error))
    match = re.search(r"Could not override '([^']+)'", text)
    if match is None:
        match = re.search(r"Could not delete from config\. '([^']+)' does not exist", text)
    typed = [argument.split("=", 1)[0].lstrip("+~") for argument in arguments]
    if match is not None and match.group(1) in typed:  # else a config file of ours, or of a plugin, is at fault
        key = match.group(1)
        keys = _known_keys(config_name, config_path, arguments, key)
        close = [name for name in nearest(key, keys) if name != key]
        if close:
            return f"Unknown key '{key}': did you mean {' or '.join(close)}?"
        parent = key.rpartition(".")[0]
        inside = [name.rpartition(".")[2] for name in keys if name.rpartition(".")[0] == parent]
        if inside and parent:
            return f"Unknown key '{key}': {parent} has the keys {', '.join(sorted(inside))}."
        return f"Unknown key '{key}': see every key with --cfg job, or add a new one by writing +{key}=..."
    match = re.search(r"You must specify '([^']+)', e\.g, [^ ]+ Available options: (.*)$", text)
    if match is not None:
        group, options = match.group(1), ", ".join(match.group(2).split())
        return f"A choice for {group} is required: add {group}=OPTION, with one of {options}."
    cause = error.__cause__
    reason = f" ({_one_line(str(cause)).split(' full_key:')[0]})" if cause is not None else ""
    return _sentence(text, reason)


def _interpolation(error: InterpolationResolutionError) -> str:
    place = f"The config value {error.full_key}" if error.full_key else "A config value"
    missing = re.search(r"Interpolation key '([^']+)' not found", str(error))
    if missing is not None:
        wanted = missing.group(1)
        return (
            f"{place} refers to {wanted}, which does not exist in this combination of options: "
            f"add +{wanted}=... to the command, or choose an option that has it."
        )
    return f"{place} cannot be resolved ({_one_line(str(error).splitlines()[0]).rstrip('.')}): give it a value instead."


def _known_keys(config_name: str, config_path: str, arguments: list[str], wrong: str) -> list[str]:
    """Every key and group of the configuration that the other arguments compose (or of the plain one)."""
    overrides = [text for text in arguments if "=" in text and not text.startswith(("-", "hydra"))]
    others = [text for text in overrides if text.split("=", 1)[0].lstrip("+~") != wrong and "," not in text]
    for attempt in (others, []):
        cfg = _try_compose(config_name, config_path, attempt)
        if cfg is None:
            continue
        choices = [group.split("@")[0] for group in cfg.hydra.runtime.choices if not group.startswith("hydra")]
        return [*choices, *(key for key in _flatten(cfg) if key.split(".")[0] != "hydra")]
    return []


def _try_compose(config_name: str, config_path: str, overrides: list[str]) -> DictConfig | None:
    try:
        return _compose(config_name, config_path, overrides)
    except (HydraException, OmegaConfBaseException):
        return None


def _compose(config_name: str, config_path: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    if config_path.startswith("pkg://"):
        with initialize_config_module(config_path.removeprefix("pkg://"), version_base="1.3"):
            return compose(config_name, overrides, return_hydra_config=True)
    with initialize_config_dir(config_path, version_base="1.3"):
        return compose(config_name, overrides, return_hydra_config=True)


def _flatten(node: object, prefix: str = "") -> list[str]:
    if isinstance(node, DictConfig):
        if node._is_none() or node._is_missing() or node._is_interpolation():
            return []
        node = dict(node.items_ex(resolve=False))
    if not isinstance(node, dict):
        return []
    names: list[str] = []
    for name, value in node.items():
        names.append(f"{prefix}{name}")
        names.extend(_flatten(value, f"{prefix}{name}."))
    return names


def _sentence(text: str, addition: str = "") -> str:
    line = _one_line(text).rstrip(".")
    return f"{line}{addition}" if line.endswith("?") and not addition else f"{line}{addition}."


def _one_line(text: str) -> str:
    return " ".join(text.split())
