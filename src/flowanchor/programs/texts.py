"""Texts on the command line as people write them: what is a name, a path or a prompt stays what was typed.

Hydra reads `name=2026_11_26` as the number 20261126, `name=1.10` as 1.1 and `data.root=/d/p=q` not at all. In its
quotes all of them are texts; `quoted` puts them there.
"""

from __future__ import annotations

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from flowanchor.base.quoting import in_quotes

# Prompts, by their whole key: always quoted. `prompt` may be a list too.
PROMPTS = ("prompt", "negative", "captions.negative")
# Names and paths, by the last part of their key: those that may be several, and those that are one whatever they hold.
SEVERAL = {
    "base_lora", "caption", "checkpoint", "clip", "dinov2", "file", "flow_teacher", "high", "index", "initialise_from",
    "inspect", "low", "metrics", "pipeline", "prompts", "reference", "root", "runs", "statistics", "tokenizer",
    "weights",
}  # fmt: skip
ONE = {
    "base_model",
    "cache_dir",
    "dir",
    "dirpath",
    "folder",
    "licence",
    "name",
    "out",
    "output",
    "project",
    "save_dir",
    "title",
}
_MULTIRUN = ("-m", "--multirun")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.S)


def quoted(arguments: list[str]) -> list[str]:
    """The arguments with the values of texts in Hydra's quotes, so that commas, colons and brackets are letters.

    What is quoted already stays, and so do dictionaries, `null`, and what Hydra reads as that text anyhow; of lists
    (`prompt=['a fox','a dog']`) it is each part that counts. In sweeps (`-m`) commas outside of quotes and brackets
    separate jobs, and prompts are left as they are.
    """
    sweep = any(argument in _MULTIRUN for argument in arguments)
    return [_quoted(argument, sweep) for argument in arguments]


def _quoted(argument: str, sweep: bool) -> str:
    name, equals, value = argument.partition("=")
    key = name.lstrip("+")
    last = re.split(r"[.@]", key)[-1]
    if not equals or value in ("", "null"):
        return argument
    if key in PROMPTS:
        written = sweep or _QUOTED.fullmatch(value) or _is_list(value)
        return argument if written else f"{name}={in_quotes(value)}"
    if last not in SEVERAL | ONE or key.startswith(("-", "~")) or "${" in value:
        return argument
    if sweep and not key.startswith("hydra."):
        if re.match(r"\w+\(.*\)$", value):  # choice(...), range(...)
            return argument
        return f"{name}={','.join(_text(part, last in ONE) for part in _parts(value))}"
    return f"{name}={_text(value, last in ONE)}"


def _text(value: str, one: bool) -> str:
    """A value as Hydra reads it for the text, or the list of texts, that it is."""
    if value in ("", "null") or _QUOTED.fullmatch(value):
        return value
    if not one and _is_list(value):
        return f"[{','.join(_text(part.strip(), False) for part in _parts(value[1:-1]))}]"
    if not one and value[0] == "{" and value[-1] == "}":
        return value
    return value if _is_read_as(value) else in_quotes(value)


def _parts(value: str) -> list[str]:
    """What commas outside of quotes and brackets separate."""
    parts, depth, at = [""], 0, 0
    while at < len(value):
        found = _QUOTED.match(value, at) if parts[-1].strip() == "" or depth else None
        piece = found[0] if found else value[at]
        at += len(piece)
        if piece == "," and depth == 0:
            parts.append("")
            continue
        depth += (piece in ("[", "{")) - (piece in ("]", "}") and depth > 0)
        parts[-1] += piece
    return parts


def _is_list(value: str) -> bool:
    return len(value) > 1 and (value[0], value[-1]) == ("[", "]")


def _is_read_as(text: str) -> bool:
    """Whether Hydra takes a value for just this text."""
    try:
        override: Override = OverridesParser.create().parse_override(f"key={text}")
        return not override.is_sweep_override() and override.value() == text
    except HydraException:
        return False
