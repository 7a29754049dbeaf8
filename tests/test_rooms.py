"""Imports of the trunk go in no circle, whether at the top of a file or inside a function."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src"


def imports(root: Path) -> dict[str, set[str]]:
    """Each module of a tree and those of the tree that it imports by `from ... import`, as it always does."""
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py")}
    modules = {path: name.removesuffix(".__init__") for path, name in names.items()}
    found: dict[str, set[str]] = {}
    for path, module in modules.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
        wanted = {(node.module or "", alias.name) for node in nodes for alias in node.names}
        used = {f"{base}.{name}" if f"{base}.{name}" in modules.values() else base for base, name in wanted}
        found[module] = used & set(modules.values()) - {module}
    return found


def test_no_circle():
    TopologicalSorter(imports(ROOT)).prepare()


def test_circles_are_seen(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from b import g\n")
    (tmp_path / "b.py").write_text("from a import f\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(tmp_path)).prepare()


def test_the_ground_stands_on_nothing():
    """What every room uses imports none of them; files of encoded sets know neither who makes nor who reads them."""
    allowed = {"base": {"base", "errors"}, "encoded": {"base", "encoded", "errors", "weights"}}
    for module, used in imports(ROOT).items():
        room = module.split(".")[1] if module.count(".") else ""
        if room in allowed:
            assert {name.split(".")[1] for name in used} <= allowed[room], module
