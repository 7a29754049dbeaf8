"""Which argument a failure is owed to, where a library met a value that it cannot use.

A type that is checked nowhere (`optimizer.lr=abc`) fails deep inside PyTorch or Lightning, in words that name no
setting. The configuration knows better: it holds a default for everything that was typed.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

Compose = Callable[[list[str]], DictConfig | None]


def blame(error: BaseException, arguments: list[str], compose: Compose) -> str | None:
    """The sentence for an error that a value of the command line explains; None if none of them does.

    Args:
        error: what went wrong.
        arguments: the command line.
        compose: overrides -> configuration with the `hydra` node, or None where they do not compose.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # seconds to import: only when asked

    refusals = (ValueError, MisconfigurationException)  # what libraries raise on purpose, with a text for the user
    accidents = (*refusals, TypeError, ZeroDivisionError)  # what a value of the wrong kind or sign leads to
    cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
    building = cause is not error  # a constructor that fails on a negative size raises a RuntimeError
    if not isinstance(cause, (*accidents, RuntimeError) if building else accidents):
        return None
    typed = dict(_settings(arguments))
    plain = compose([])
    if plain is None or not typed:
        return None
    groups = [group.split("@")[0] for group in plain.hydra.runtime.choices]
    chosen = [text for text in arguments if "," not in text and _key(text) in groups or "/" in _key(text)]
    defaults = compose(chosen) or plain
    values = {key: value for key, value in typed.items() if key not in groups and "/" not in key}
    message = _short(str(cause))
    odd = {key: OmegaConf.select(defaults, key) for key in values}
    built = re.search(r"full_key: (\S+)", str(error)) if building else None
    # What differs from its default is no suspect by itself: the failing call was given it, or the message names it.
    near = [
        key
        for key, value in values.items()
        if _is_named(key, value, message) or _is_within(key, built) or _was_given(cause, key, value)
    ]
    suspects = [key for key in near if _other_kind(values[key], odd[key])]
    suspects = suspects or [key for key in near if _below(values[key], odd[key])]
    if not suspects and isinstance(cause, TypeError):  # text where the default is null
        suspects = [key for key in near if odd[key] is None and isinstance(values[key], str)]
    if not suspects and isinstance(cause, refusals):
        suspects = [key for key in values if _is_named(key, values[key], message)]
    if not suspects:
        return None
    key = suspects[0]
    text = next(text for text in reversed(arguments) if _key(text) == key)
    default = odd[key]
    usual = "" if default is None or OmegaConf.is_config(default) else f" (the default is {key}={default})"
    wrong = text.lstrip("+")
    return f"{wrong} cannot be used here, it seems ({message}): correct it{usual}, or add debug=true to see where."


def _settings(arguments: Iterable[str]) -> Iterable[tuple[str, Any]]:
    for text in arguments:
        key, equals, value = text.partition("=")
        if equals and not key.startswith(("-", "~", "hydra.")):
            try:
                yield key.lstrip("+"), _number(yaml.safe_load(value))
            except yaml.YAMLError:
                yield key.lstrip("+"), value


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text, Hydra as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def _other_kind(value: Any, default: Any) -> bool:
    if OmegaConf.is_list(default):
        return isinstance(value, str)
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return False
    return isinstance(value, (str, bool, dict)) or (isinstance(default, int) and isinstance(value, float))


def _below(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or isinstance(default, bool):
        return False
    if default is None or isinstance(default, int) and default > 0:
        return value <= 0
    return isinstance(default, (int, float)) and default >= 0 and value < 0


def _is_within(key: str, built: re.Match[str] | None) -> bool:
    """Whether the setting belongs to what Hydra was building."""
    return built is not None and f"{key}.".startswith(f"{built[1]}.")


def _was_given(error: BaseException, key: str, value: Any) -> bool:
    """Whether one of the two innermost calls has an argument of that name and value."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-2:]
    name = key.rsplit(".", 1)[-1]
    return any(
        name in frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        and str(frame.f_locals.get(name)) == str(value)
        for frame in frames
    )


def _is_named(key: str, value: Any, message: str) -> bool:
    words = re.findall(r"[a-z0-9_.]+", message.lower())
    spoken = str(value).lower() in words and isinstance(value, str) and len(value) > 2
    return spoken or key.rsplit(".", 1)[-1].lower() in words


def _short(message: str) -> str:
    """The first sentences of a message on one line, without the stop at their end."""
    line = " ".join(message.split()).replace(". ", "; ").rstrip(".!")
    return line if len(line) <= 240 else line[:240].rsplit(" ", 1)[0] + " ..."
