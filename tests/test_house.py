"""The rooms of the house: what an option chooses lies in plugins/, and the trunk knows no plugin and no family."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TRUNK = ROOT / "src" / "flowanchor"

# Groups whose options are the trainer's own machinery, or a library's.
MACHINERY = {
    "callbacks": "of the training loop",
    "debugging": "settings of the trainer",
    "ema": "a callback",
    "experiment": "recipes: they name no class",
    "hparams_search": "of Hydra",
    "hydra": "of Hydra",
    "jvp": "tangent engines: the product itself",
    "jvp/attention": "kernels of the engines",
    "launcher": "of Hydra",
    "logger": "of Lightning, made to go on after a resume",
    "optimizer": "of PyTorch",
    "strategy": "of the training loop",
    "trainer": "Lightning's",
}
# conf/<group>/ -> plugins/<folder>/
FOLDERS = {
    "backbone": "backbones", "backbone/description": "backbones.diffusers", "codec": "codecs", "data": "data",
    "format": "formats", "metric": "metrics",
    "objective": "objectives", "objective/anchor": "objectives.anchors", "objective/interval": "objectives.intervals",
    "objective/shortcut": "objectives.shortcuts", "objective/time": "objectives.times",
    "objective/weight": "objectives.weights", "sampler": "samplers", "teacher": "teachers",
    "text_encoder": "text_encoders",
}  # fmt: skip
# A trunk file that imports a plugin: why.
IMPORTS_A_PLUGIN = {"testing/objective.py": "tries an objective on a small network that is there"}
# A trunk file that says the name of a family, in any but a comment, a docstring or a hint for the user: none.
FAMILIES = re.compile(r"(?<![a-z])(wan|lightningdit|vavae|umt5|sit|dit)(?![a-z])", re.IGNORECASE)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def options() -> list[Path]:
    return sorted((ROOT / "conf").glob("*/**/*.yaml"))


def test_what_an_option_chooses_has_its_class_in_the_plugin_folder_of_its_group():
    for option in options():
        group = option.parent.relative_to(ROOT / "conf").as_posix()
        assert group in MACHINERY or group in FOLDERS, f"conf/{group}/ is a new group: where do its classes lie?"
        content = yaml.safe_load(option.read_text(encoding="utf-8")) or {}
        target = content.get("_target_") if isinstance(content, dict) else None
        if target is not None and group in FOLDERS:
            folder = FOLDERS[group].split(".")[0]
            assert target.startswith(f"flowanchor.plugins.{folder}."), f"{option.name} names {target}"


def trunk() -> list[Path]:
    return sorted(TRUNK.rglob("*.py"))


def test_the_trunk_imports_no_plugin():
    found = set()
    for file in trunk():
        for node in ast.walk(parsed(file)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith("flowanchor.plugins") for name in names):
                found.add(file.relative_to(TRUNK).as_posix())
    assert found == set(IMPORTS_A_PLUGIN)


def test_the_trunk_names_no_family():
    """Neither a name nor a value of its code: messages may tell a user what to type, in whole sentences."""
    found = []
    for file in trunk():
        if file.relative_to(TRUNK).as_posix() in (*IMPORTS_A_PLUGIN, "base/moved.py"):  # moved: a table of old names
            continue
        tree = parsed(file)
        for node in ast.walk(tree):
            words = []
            if isinstance(node, ast.Name):
                words = [node.id]
            elif isinstance(node, ast.Attribute):
                words = [node.attr]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                words = [node.name]
            elif isinstance(node, ast.arg):
                words = [node.arg]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                words = [node.value]
            found += [f"{file.relative_to(TRUNK)}:{node.lineno} {word}" for word in words if FAMILIES.search(word)]
    assert not found


@pytest.fixture(scope="module")
def structure():
    """benchmarks/structure.py"""
    path = ROOT / "benchmarks" / "structure.py"
    spec = importlib.util.spec_from_file_location("structure", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["structure"] = module
    spec.loader.exec_module(module)
    return module


def test_no_import_goes_in_a_circle_or_upwards(structure):
    found = structure.still(ROOT)
    assert found["circles"] == []
    assert found["up"] == []


def test_the_ground_stands_on_nothing(structure):
    """What every room uses imports none of them; files of encoded sets know neither who makes nor who reads them."""
    allowed = {"base": {"base", "errors"}, "encoded": {"base", "encoded", "errors", "weights"}}
    known = structure.files(ROOT)
    for module, file in known.items():
        room = module.split(".")[1] if module.count(".") else ""
        if room in allowed:
            used = structure.imports(parsed(file), module, known)
            assert {name.split(".")[1] for name, _ in used} <= allowed[room], module


def test_counting_sees_what_it_counts(structure, tmp_path):
    """A circle, an arrow that points up, an import inside a function, a probe."""
    source = tmp_path / "src" / "flowanchor"
    (source / "base").mkdir(parents=True)
    (source / "programs").mkdir()
    (tmp_path / "plugins").mkdir()
    (source / "base" / "low.py").write_text("from flowanchor.programs import high\n")
    (source / "programs" / "high.py").write_text(
        "def f(x):\n    from flowanchor.base import low\n    return hasattr(x, 'y')  # type: ignore\n"
    )
    found = structure.still(tmp_path)
    assert found["circles"] == [["flowanchor.base.low", "flowanchor.programs.high"]]
    assert found["up"] == ["flowanchor.base.low -> flowanchor.programs.high"]
    assert (found["imports inside functions"], found["probes"], found["type: ignore"]) == (1, 1, 1)
