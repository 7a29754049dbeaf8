"""Prompts on the command line as people write them: `prompt="a fox, in the snow"` needs no second pair of quotes."""

from __future__ import annotations

import re

# Settings that are texts. `prompt` may be a list too.
TEXTS = ("prompt", "negative", "captions.negative")
_MULTIRUN = ("-m", "--multirun")


def quoted(arguments: list[str]) -> list[str]:
    """The arguments with the values of texts in Hydra's quotes, so that commas, colons and brackets are letters.

    What is quoted already stays, and so do lists (`prompt=['a fox','a dog']`), `null`, and sweeps (`-m`), where commas
    separate jobs.
    """
    if any(argument in _MULTIRUN for argument in arguments):
        return list(arguments)
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not equals or name.lstrip("+") not in TEXTS or value in ("", "null") or _is_written_for_hydra(value):
        return argument
    # In Hydra's quotes a backslash escapes a quote, and backslashes before one.
    inside = re.sub(r"(\\*)'", lambda found: f"{2 * found[1]}\\'", value)
    inside = re.sub(r"(\\+)$", lambda found: 2 * found[1], inside)
    return f"{name}='{inside}'"


def _is_written_for_hydra(value: str) -> bool:
    first, last = value[0], value[-1]
    return len(value) > 1 and (first == last and first in "'\"" or (first, last) == ("[", "]"))
