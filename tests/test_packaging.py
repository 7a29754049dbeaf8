"""The wheel holds the whole package, and what is installed from it runs outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.cold
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"src/flowanchor": "flowanchor", "plugins": "flowanchor/plugins", "conf": "flowanchor/conf"}
BUILD_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
HIDDEN = shutil.ignore_patterns("__pycache__", "*.egg-info")


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(part) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("src", "plugins", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=HIDDEN)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    done = run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, checkout, folder=folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("flowanchor-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel]
    done = run(*pip, folder=target)
    assert done.returncode == 0, done.stderr
    return target


def test_wheel_holds_every_module_and_every_config(wheel):
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts
    }
    models = ROOT / "src" / "flowanchor" / "shipped"
    expected |= {f"flowanchor/shipped/{path.relative_to(models).as_posix()}" for path in models.rglob("*.*")}
    assert "flowanchor/shipped/digits/model.safetensors" in expected
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_console_scripts_name_programs_that_exist(installed):
    scripts = PathDistribution(next(installed.glob("flowanchor-*.dist-info"))).entry_points.select(
        group="console_scripts"
    )
    names = {script.name for script in scripts}
    programs = ("train", "sample", "eval", "demo", "convert", "report", "encode")
    assert names == {f"flowanchor-{program}" for program in programs}
    for script in scripts:
        assert (ROOT / "src" / "flowanchor" / "programs" / f"{script.module.rsplit('.', 1)[-1]}.py").is_file(), script


def test_installed_program_composes_outside_the_repository(installed, tmp_path):
    program = [sys.executable, installed / "bin" / "flowanchor-train", "--cfg", "job", "objective=flow_matching"]
    done = run(*program, folder=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "flowanchor.plugins.backbones.lightningdit" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_installed_package_is_whole(installed, tmp_path):
    code = "import flowanchor, flowanchor.plugins.backbones.lightningdit as m; print(flowanchor.__path__, m.__file__)"
    done = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout and str(installed / "flowanchor" / "plugins") in done.stdout


def test_a_checkout_uses_its_own_options_whatever_is_installed(installed, checkout, tmp_path):
    """`python src/train.py` in a clone must not read the plugins and configs of another version in site-packages."""
    own = shutil.copytree(checkout, tmp_path / "clone", ignore=shutil.ignore_patterns("build"))
    (own / "conf" / "backbone" / "mine.yaml").write_text("_target_: flowanchor.plugins.mine.Net\n")
    (own / "plugins" / "mine.py").write_text("raise SystemExit('imported from ' + __file__)\n")
    program = [sys.executable, own / "src" / "train.py", "backbone=mine"]
    done = run(*program, folder=tmp_path, PYTHONPATH=str(installed))
    assert f"imported from {own / 'plugins' / 'mine.py'}" in done.stderr, done.stderr


def test_every_import_is_a_declared_dependency():
    """A package that happens to lie in a developer's environment is missing on a fresh machine."""
    import ast
    import re
    import sys
    from importlib.metadata import packages_distributions

    text = (ROOT / "pyproject.toml").read_text()  # not the installed metadata, which may be older
    declared = set(re.findall(r"^ +\"([\w-]+)", text[: text.index("[project.optional-dependencies]")], re.M))
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    imported: dict[str, set[Path]] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                imported.setdefault(name.split(".")[0], set()).add(file)
    foreign = {name: found for name, found in imported.items() if name not in {*sys.stdlib_module_names, "flowanchor"}}
    assert "torch" in foreign
    # Imported only where it is found, and refused with a sentence where it is not (an extra).
    optional = {"triton": "triton_kernel.py", "ftfy": "frozen.py", "peft": "lora.py", "gradio": "page.py"}
    for name, file in optional.items():
        assert [found.name for found in foreign.pop(name)] == [file]
    assert {found.name for found in foreign.pop("transformers")} == {"frozen.py", "clip.py"}
    providers = packages_distributions()
    for name, files in foreign.items():
        found = {provider.lower().replace("_", "-") for provider in providers.get(name, [name])}
        assert found & declared, f"{files} import {name}, which pyproject.toml does not declare"
