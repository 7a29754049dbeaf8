"""Whether values from a file are of the types that a class of ours states for its arguments.

Python does not ask, so a text in the place of a number would be told in a stranger's words, or much later.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from flowanchor.base.plain import bare, described, shown
from flowanchor.errors import CheckpointError, ConfigError


def check_arguments(made: Any, arguments: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless `made(**arguments, **chosen)` is a call that fits.

    That is its names and, for our classes, the types of `arguments`; what the user has `chosen` may be anything, but
    for a name that there is not, which is a `ConfigError`.
    """
    try:
        inspect.signature(made).bind(**arguments, **chosen)
    except ValueError:  # of a class in C, which says nothing about itself
        return
    except TypeError as error:
        known = [name for name in inspect.signature(made).parameters if name != "self"]
        typed = [name for name in chosen if name not in known]
        if typed:
            raise ConfigError(
                f"{getattr(made, '__qualname__', 'This class')} has no setting {', '.join(typed)}: it has "
                f"{', '.join(known)}."
            ) from error
        raise CheckpointError(
            f"the settings of its {getattr(made, '__qualname__', 'class')} do not fit ({error})"
        ) from error
    owner = getattr(made, "__self__", None)
    if not isinstance(owner, type):
        _check_types(made, arguments)
        return
    for constructor in (made, owner):  # `from_preset` hands on what it does not know, and leaves out what is null
        _check_types(constructor, {name: value for name, value in arguments.items() if value is not None})


def _check_types(constructor: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    if not str(getattr(constructor, "__module__", "")).startswith("flowanchor."):
        return
    owners: list[Any] = list(constructor.__mro__) if isinstance(constructor, type) else []
    outer_first = [one.__init__ for one in owners] or [constructor]
    hints: dict[str, Any] = {}
    for function in reversed(outer_first):  # a constructor hands on what it does not know
        if inspect.isfunction(function) or inspect.ismethod(function):
            hints.update(get_type_hints(function))
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            what = shown(value) if isinstance(value, (str, int, float)) else described(value)
            raise CheckpointError(f"the setting {bare(name)} is {what}, which is of the wrong kind")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type; of types that are none of JSON's, any value may be."""
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is bool:
        return isinstance(value, bool) or value in (0, 1)
    if origin in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, float) if origin is float else int)
    if origin in (str, NoneType):
        return isinstance(value, origin)
    if origin in (list, tuple, Sequence):
        inner = get_args(hint)[:1]
        return isinstance(value, (list, tuple)) and (not inner or all(_fits(one, inner[0]) for one in value))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return True
