"""The one door from what a file says to an object: a checkpoint is data, and this is all that it can have built.

`build` takes plain values (`flowanchor.base.plain`), allows the classes that are registered for that place
(`flowanchor.base.registry`), and calls them. It resolves nothing, and imports a class only once it is allowed.
Hydra's `instantiate` is for what a user typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

from flowanchor.base.arguments import check_arguments
from flowanchor.base.plain import described, plain, shown
from flowanchor.base.registry import current_name, registered
from flowanchor.errors import CheckpointError, ConfigError, FlowAnchorError

# What may stand at a place: the module and the name of its contract.
CONTRACTS = {
    "backbone": ("flowanchor.interfaces", "Backbone"),
    "objective.interval": ("flowanchor.interfaces", "Interval"),
    "sampler": ("flowanchor.interfaces", "Sampler"),
    "codec": ("flowanchor.interfaces", "Codec"),
    "text_encoder": ("flowanchor.text.base", "TextEncoder"),
    "data": ("flowanchor.data.base", "FlowDataModule"),
    "format": ("flowanchor.checkpoints.format", "Format"),
}


def build(settings: Any, place: str, source: object, chosen: Mapping[str, Any] | None = None) -> Any:
    """What a file describes at a place of its configuration (`backbone`, `sampler`, ...).

    Args:
        settings: `{_target_: a registered class, argument: value, ...}`, from the file.
        source: the file, for messages.
        chosen: arguments from the user, as they are, that take the place of the file's.

    Raises:
        CheckpointError: settings that are not plain, a class that is not registered for this place, or that refuses
            its arguments.
        FlowAnchorError: whatever the class itself tells its user, with the file's name before it.
    """
    theirs = dict(chosen or {})
    if theirs and isinstance(settings, dict):
        kept = {key: value for key, value in settings.items() if key not in theirs}
        settings = {"_target_": theirs.pop("_target_"), **kept} if "_target_" in theirs else kept
    made = _call(check(settings, place, source), place, source, theirs)
    module, name = CONTRACTS[place]
    if not isinstance(made, getattr(import_module(module), name)):
        raise CheckpointError(
            f"{source}: its {place} is a {type(made).__name__}, which is no {name}: do not use this file."
        )
    return made


def check(settings: Any, place: str, source: object) -> dict[str, Any]:
    """A plain copy of settings that may be built at a place; nothing is imported or built."""
    found = plain(settings, f"{source}: {place}")
    if not isinstance(found, dict) or "_target_" not in found:
        what = "names no class (_target_)" if isinstance(found, dict) else f"is {described(found)}"
        raise CheckpointError(f"{source}: its {place} {what}: give a file that flowanchor has written.")
    _check(found, place, source)
    if place == "data":
        _keep_here(found, place, source)
    return found


def _keep_here(value: Any, place: str, source: object) -> None:
    """Data may lie behind any address, a command's output among them, and may be fetched: a user says so, no file."""
    if isinstance(value, dict):
        if "download" in value:
            value["download"] = False
        for key, inner in value.items():
            _keep_here(inner, f"{place}.{key}", source)
    elif isinstance(value, list):
        for inner in value:
            _keep_here(inner, f"{place}.*", source)
    elif isinstance(value, str) and ":" in value and not re.fullmatch(r"[A-Za-z]:[\\/][^:]*", value):
        raise CheckpointError(
            f"{source} names {shown(value)} as {place}, and what is fetched or run is not for a file to say: type it "
            f"yourself (data_overrides.{place.partition('.')[2]}=...), or use other data."
        )


def _check(value: Any, place: str, source: object) -> None:
    if isinstance(value, list):
        for inner in value:
            _check(inner, f"{place}.*", source)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key == "_target_":
            if not isinstance(inner, str) or current_name(inner) not in registered(place):
                raise _not_registered(inner, place, source)
        elif key.startswith("_"):
            raise CheckpointError(f"{source}: its {place} has the key {shown(key)}, which no file may: do not use it.")
        else:
            _check(inner, f"{place}.{key}", source)


def _not_registered(target: Any, place: str, source: object) -> CheckpointError:
    own = registered(place)
    if not own:  # a value in which no option has a class
        advice = "nothing is built there: do not use this file"
    elif isinstance(target, str) and target.startswith("flowanchor."):
        advice = "use the version of flowanchor that wrote it, or do not use this file"
    else:
        advice = "install the plugin package that has it, or register it in an option of your own (docs/plugins.md)"
    return CheckpointError(
        f"{source} asks for {shown(target)} as its {place}, and neither flowanchor nor an installed plugin package "
        f"has registered that there: {advice}."
    )


def _call(value: Any, place: str, source: object, chosen: dict[str, Any]) -> Any:
    """A checked value with its objects in place of their descriptions."""
    if isinstance(value, list):
        return [_call(inner, f"{place}.*", source, {}) for inner in value]
    if not isinstance(value, dict):
        return value
    arguments = {key: _call(inner, f"{place}.{key}", source, {}) for key, inner in value.items() if key != "_target_"}
    if "_target_" not in value:
        return arguments
    target = current_name(value["_target_"])
    try:
        made = _located(target)
        check_arguments(made, arguments, chosen)
        return made(**arguments, **chosen)
    except FlowAnchorError as error:
        if chosen:  # what the user typed is as likely to be the cause
            raise
        raise type(error)(f"{source}: {place}: {error}".removesuffix(".") + ".") from error
    except Exception as error:  # whatever a class, or what it imports, makes of settings that it does not expect
        if chosen:
            typed = ", ".join(f"{place}.{name}" for name in chosen)
            raise ConfigError(
                f"The {place} of {source} cannot be built with your settings ({brief(error)}): correct {typed}."
            ) from error
        raise CheckpointError(
            f"{source}: its {place} cannot be built as {target.rpartition('.')[2]} ({brief(error)}): use the version "
            "of flowanchor, or of the plugin package, that wrote it."
        ) from error


@lru_cache(maxsize=64)
def _located(target: str) -> Any:
    """The class, or the constructor of a class, of a registered name."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:  # that of a class is none; what it needs may be missing, too
            raise
        owner, _, outer = module.rpartition(".")
        found = getattr(getattr(import_module(owner), outer), name)
    if not isinstance(getattr(found, "__self__", found), type):
        raise TypeError(f"{name} is no class")
    return found


def brief(error: BaseException) -> str:
    """The first line of an error of a library, short, for the middle of a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = re.sub(r"[.:!]+$", "", line.replace(". ", "; "))
    return "".join(c if c.isprintable() else "?" for c in (line if len(line) <= 160 else line[:157] + "..."))
