"""What mkdocs needs beside the pages: links that leave docs/, and the reference made of docstrings, a page per room."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "build" / "site" / "flowanchor"  # the package as it is installed, out of links: src, plugins

# Room -> its modules; a folder stands for the public modules in it.
ROOMS = {
    "Opening a model": ["flowanchor", "checkpoints/load", "generation"],
    "Contracts": ["interfaces", "drawing", "conditioning", "request", "velocity", "errors", "weights"],
    "Training": ["module", "ema", "ema_posthoc", "callbacks", "strategies", "graphs", "optimizers"],
    "Tangents": ["jvp", "jvp/attention"],
    "Jumps": ["jumps"],
    "Data": ["data", "encoded", "encoding", "text"],
    "Checkpoints": ["checkpoints", "exports"],
    "Evaluation": ["metrics"],
    "Reporting": ["reporting"],
    "Objectives": [
        f"plugins/objectives{part}" for part in ("", "/anchors", "/shortcuts", "/intervals", "/times", "/weights")
    ],
    "Networks": ["plugins/backbones", "plugins/teachers"],
    "Samplers and codecs": ["plugins/samplers", "plugins/codecs"],
    "Plugins: data, metrics, formats": ["plugins/data", "plugins/metrics", "plugins/formats", "plugins/text_encoders"],
    "Trying a plugin": ["testing"],
    "Ground": ["base"],
}
REST = "Other modules"
COMMANDS = "flowanchor.programs"  # told by their command lines


def lay_out() -> None:
    """The package as it is installed."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    wanted = {source.name: source for source in [*(ROOT / "src" / "flowanchor").iterdir(), ROOT / "plugins"]}
    for link in PACKAGE.iterdir():
        link.unlink()
    for name in wanted.keys() - {"__pycache__"}:
        (PACKAGE / name).symlink_to(wanted[name])


lay_out()  # here: mkdocstrings looks for its paths before any event of a hook


def on_config(config: Any) -> Any:
    """Put the reference into the navigation."""
    for section in config.nav:
        if section.get("Reference") == "api/":
            section["Reference"] = [{room: f"api/{_file(room)}"} for room in rooms()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages of the reference."""
    for room, names in rooms().items():
        body = "\n".join(f"::: {name}\n" for name in names)
        text = f"# {room}\n\nMade from the docstrings of the public modules.\n\n{body}"
        files.append(File.generated(config, f"api/{_file(room)}", content=text))
    return files


def rooms() -> dict[str, list[str]]:
    """Room -> its modules: each stands in the first room that has it, and what no room has in the last one."""
    told: set[str] = set()
    found = {}
    for room, parts in ROOMS.items():
        found[room] = [name for part in parts for name in _modules(part) if name not in told]
        told.update(found[room])
    every = {_name(file) for folder in (PACKAGE, *PACKAGE.iterdir()) for file in _public(folder)}
    rest = sorted(name for name in every - told if not name.startswith(COMMANDS))
    return {**found, REST: rest} if rest else found


def _public(folder: Path) -> list[Path]:
    """Its modules; those of folders in it too, where it is not the package itself."""
    found = folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py") if folder.is_dir() else ()
    return [file for file in found if not file.name.startswith("_")]


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def _file(room: str) -> str:
    return re.sub(r"\W+", "_", room.lower()) + ".md"


def _modules(part: str) -> list[str]:
    """`jvp` -> flowanchor.jvp.chain and its neighbours; `module` -> flowanchor.module."""
    if part == "flowanchor":
        return ["flowanchor"]
    path = PACKAGE / part
    if path.with_suffix(".py").is_file():
        return [f"flowanchor.{part.replace('/', '.')}"]
    found = [file for file in sorted(path.glob("*.py")) if not file.name.startswith("_")]
    assert found, f"docs/hooks.py: there is no module {part}"
    return [_name(file) for file in found]


# -------------------------------------------------------------------------------------------------------------- links


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link out of docs/ goes to the repository if `repo_url` names it, and is a file's name otherwise."""
    here = (ROOT / "docs" / page.file.src_uri).parent

    def mended(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path = Path(os.path.normpath(here / target.partition("#")[0]))
        if path.is_relative_to(ROOT / "docs") or not path.exists():  # what does not exist: mkdocs says so
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name})"
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    link = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s]+)\)")
    return "".join(part if i % 2 else link.sub(mended, part) for i, part in enumerate(parts))
