"""Texts on the command line as people write them: what is a name, a path or a prompt stays what was typed.

Hydra reads `name=2026_11_26` as the number 20261126, `name=1.10` as 1.1 and `data.root=/d/p=q` not at all. In its
quotes all of them are texts; `quoted` puts them there.
"""

from __future__ import annotations

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

# Prompts, by their whole key: always quoted. `prompt` may be a list too.
PROMPTS = ("prompt", "negative", "captions.negative")
# Names and paths, by the last part of their key.
NAMES = {
    "cache_dir", "caption", "checkpoint", "dir", "dirpath", "file", "folder", "high", "index", "initialise_from",
    "inspect", "low", "metrics", "name", "out", "output", "pipeline", "project", "prompts", "reference", "root", "runs",
    "save_dir", "statistics", "title", "weights",
}  # fmt: skip
_MULTIRUN = ("-m", "--multirun")


def quoted(arguments: list[str]) -> list[str]:
    """The arguments with the values of texts in Hydra's quotes, so that commas, colons and brackets are letters.

    What is quoted already stays, and so do lists (`prompt=['a fox','a dog']`), dictionaries, `null`, and what Hydra
    reads as that text anyhow. In sweeps (`-m`) commas separate jobs, and prompts are left as they are.
    """
    sweep = any(argument in _MULTIRUN for argument in arguments)
    return [_quoted(argument, sweep) for argument in arguments]


def _quoted(argument: str, sweep: bool) -> str:
    name, equals, value = argument.partition("=")
    key = name.lstrip("+")
    if not equals or value in ("", "null") or _is_written_for_hydra(value):
        return argument
    if key in PROMPTS:
        return argument if sweep else f"{name}={_in_quotes(value)}"
    if re.split(r"[.@]", key)[-1] not in NAMES or key.startswith(("-", "~")) or "${" in value:
        return argument
    if not sweep:
        return argument if _is_read_as(argument, value) else f"{name}={_in_quotes(value)}"
    if re.match(r"\w+\(.*\)$", value):  # choice(...), range(...)
        return argument
    parts = [part if _is_read_as(f"{name}={part}", part) else _in_quotes(part) for part in value.split(",")]
    return f"{name}={','.join(parts)}"


def _is_read_as(argument: str, text: str) -> bool:
    """Whether Hydra takes the value of an argument for just this text."""
    try:
        override: Override = OverridesParser.create().parse_override(argument)
        return not override.is_sweep_override() and override.value() == text
    except HydraException:
        return False


def _in_quotes(value: str) -> str:
    # In Hydra's quotes a backslash escapes a quote, and backslashes before one.
    inside = re.sub(r"(\\*)'", lambda found: f"{2 * found[1]}\\'", value)
    inside = re.sub(r"(\\+)$", lambda found: 2 * found[1], inside)
    return f"'{inside}'"


def _is_written_for_hydra(value: str) -> bool:
    first, last = value[0], value[-1]
    return len(value) > 1 and (first == last and first in "'\"" or f"{first}{last}" in ("[]", "{}"))
