"""What can be chosen, read off the YAML files under conf/ of flowanchor and of plugin packages; nothing is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from flowanchor.base.plugins import own_conf, plugin_folders

INTERNAL = ("hydra",)  # groups that nobody chooses from
_COMMAND = re.compile(r"\s*(\s{3}|\s(by )? python src/|Run:|Needs:? ).*$")  # what to type, behind the sentence


@dataclass(frozen=True)
class Option:
    """One file of a group: `group=name`."""

    group: str
    name: str
    line: str  # what it is, from the first line of its file
    package: str  # where it comes from; empty: flowanchor


@lru_cache(maxsize=1)
def options() -> tuple[Option, ...]:
    """All options, by group and name; of two with the same name the first folder's counts, as in Hydra's search."""
    found: dict[tuple[str, str], Option] = {}
    places = [("", own_conf()), *((_owner(entry), folder) for entry, folder in plugin_folders(warn=False))]
    for package, folder in places:
        for file in sorted(folder.glob("*/**/*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            if group.split("/")[0] not in INTERNAL:
                found.setdefault((group, file.stem), Option(group, file.stem, header(file), package))
    return tuple(found[key] for key in sorted(found))


def _owner(entry: Any) -> str:
    return str(entry.dist.name if entry.dist is not None else entry.name)


def packages() -> dict[str, str]:
    """Installed plugin packages, each with the line that it says of itself."""
    entries = [entry for entry, _ in plugin_folders(warn=False)]
    return {_owner(entry): (entry.dist.metadata["Summary"] or "") if entry.dist else "" for entry in entries}


def groups() -> list[str]:
    """Names of all groups."""
    return list(dict.fromkeys(option.group for option in options()))


def header(file: Path) -> str:
    """The first sentence of a file's comment, without the command that follows it; empty where it has none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    for line in lines:
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if text and not text.startswith(("@package", "python ")):
            text = re.sub(r"^[\w/]+=\w+: ", "", _COMMAND.sub("", text).strip())  # `ema=power: ...`
            whole = text.rpartition(". ")[0]
            return text if text.endswith((".", ")", "]")) or not whole else f"{whole}."
    return ""


@lru_cache(maxsize=8)
def settings(program: str) -> dict[str, tuple[str, str]]:
    """The settings of a program's own file, in order: name -> (default as written, comment)."""
    file = own_conf() / f"{program}.yaml"
    found: dict[str, tuple[str, str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(\w+):\s*(.*?)\s*(?:#\s*(.*))?$", line)
        if match and match[1] not in ("defaults", "hydra"):
            found[match[1]] = (match[2], match[3] or "")
    return found


@lru_cache(maxsize=8)
def chosen_groups(program: str) -> dict[str, tuple[str, str]]:
    """The groups that a program composes, in the order of its file: group -> (default option, comment)."""
    file = own_conf() / f"{program}.yaml"
    text = file.read_text(encoding="utf-8")
    content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found: dict[str, tuple[str, str]] = {}
    for entry in content.get("defaults", []):
        if not isinstance(entry, dict):
            continue
        for key, value in entry.items():
            group = key.removeprefix("optional ").split("@")[0]
            comment = re.search(rf"^  - {re.escape(key)}:[^#\n]*#\s*(.*)$", text, re.MULTILINE)
            if group not in INTERNAL:
                found[group] = ("" if value is None else str(value), comment[1] if comment else "")
    return found
