"""Classes as people say them: by their names, or by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from flowanchor.errors import ConfigError

SHOWN = 20  # names in a message


def class_numbers(classes: Any, names: Sequence[str]) -> Any:
    """The same with numbers in the place of names.

    A text is a name, in whatever case, and only where there is none such a number ("3"). Anything but a text, or a
    list in which one stands, is returned as it is.

    Args:
        classes: one, or a list; None: every class.
        names: of the classes that the checkpoint holds; empty: none.

    Raises:
        ConfigError: a text that is no name of a class, with those that it may have meant.
    """
    if isinstance(classes, str):
        return _number(classes, names)
    if isinstance(classes, (list, tuple)) and any(isinstance(one, str) for one in classes):
        return [_number(one, names) if isinstance(one, str) else one for one in classes]
    return classes


def _number(text: str, names: Sequence[str]) -> int:
    if text in names:
        return list(names).index(text)
    folded = [name.casefold() for name in names]
    if folded.count(text.casefold()) == 1:
        return folded.index(text.casefold())
    if text.isascii() and text.isdigit():
        return int(text)
    if not names:
        raise ConfigError(f"classes={text}: this checkpoint holds no names of its classes: use numbers, such as [0,1].")
    close = [names[folded.index(name)] for name in get_close_matches(text.casefold(), folded, n=3, cutoff=0.6)]
    if close:
        raise ConfigError(f"There is no class '{text}': did you mean {' or '.join(close)}?")
    more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
    raise ConfigError(f"There is no class '{text}': it has {', '.join(names[:SHOWN])}{more}.")
