"""The documentation is true: links resolve, files that it shows are valid, and every command in it runs.

A page is read from top to bottom in a clone of its own (a copy of what the programs need) and may use what it made:

- a ```python or ```yaml block whose first line is a comment with a path (`# plugins/backbones/mine.py`) is written
  there, any other ```python block is run as a script;
- each line of a ```bash block is run as written, with the shortest possible training added to it, as a script's
  `max_steps` becomes 2; `make` is expanded and the programs it would start are run; `pip install` of a local folder
  goes to a folder beside the clone;
- a block after `<!-- not run: reason -->` is skipped, with the reason in the test report.
"""

from __future__ import annotations

import compileall
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "data/README.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)

GRID = "callbacks.sample_grid.nfe=[1]"
# The least that each program can do: added after the words of a command, where they win.
SHORT = {
    "train.py": ["trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.limit_val_batches=1", GRID],
    "eval.py": ["num_samples=20"],
    "sample.py": ["num_samples=10"],
    "demo.py": ["quick=true", "num_samples=20", "teacher.quick_steps=1", "student.quick_steps=1"],
}
# And the smallest network, where a command trains the usual one and says nothing of its size.
SMALL = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2"]
SECONDS = 280  # that a command may take
SCRIPTS = {"flowanchor-train": "train.py", "flowanchor-sample": "sample.py", "flowanchor-eval": "eval.py"}
SCRIPTS |= {"flowanchor-demo": "demo.py", "flowanchor-convert": "convert.py"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    not_run: str | None  # the reason, where a page gives one

    @property
    def file(self) -> str | None:
        first = self.text.splitlines()[0] if self.text else ""
        match = re.fullmatch(r"# ((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|toml))", first.strip())
        return match.group(1) if match else None

    @property
    def commands(self) -> list[str]:
        joined = self.text.replace("\\\n", " ")
        lines = [shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines()]
        return [line for line in lines if line]


@dataclass
class Step:
    """One thing to check of a page: a command, a script, or a file to write first."""

    page: Path
    block: Block
    command: str | None = None
    first: list[Block] = field(default_factory=list)  # files that the page shows before this step

    @property
    def does(self) -> tuple[str, ...]:
        """All that it comes to: what is run, and the files that the page has shown by then."""
        return (self.command or self.block.text, *(block.text for block in self.first))

    def __str__(self) -> str:
        what = self.command or f"{self.block.language} block"
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.block.line} {what}"


def blocks(page: Path) -> list[Block]:
    found = []
    fence = re.compile(r"(<!-- not run: (?P<why>.+?) -->\s*\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
    text = page.read_text()
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(match["language"], match["text"], line, match["why"]))
    return found


def steps() -> list[Step]:
    found: list[Step] = []
    for page in PAGES:
        files: list[Block] = []
        for block in blocks(page):
            if block.language in ("bash", "sh", "shell", "console"):
                found.extend(Step(page, block, command, list(files)) for command in block.commands)
            elif block.file is not None:
                files.append(block)
            elif block.language == "python":
                found.append(Step(page, block, None, list(files)))
    return found


def copied(folder: Path) -> Path:
    """A copy of what the programs need, compiled once for all clones."""
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("src", "plugins", "conf", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("src", "plugins"):
        assert compileall.compile_dir(folder / name, quiet=1)
    return folder


def clone(copy: Path, folder: Path) -> Path:
    """The same files once more, as links: a step that writes one puts a new one into its place."""
    return Path(shutil.copytree(copy, folder / "flowanchor", copy_function=os.link))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Step -> what went wrong, nothing where it went well. The steps of a page in order, two pages at a time.

    A page whose steps are all steps of another page, in that order, is checked there; so is a step by itself of which
    nothing else on its page knows.
    """
    pages: dict[Path, list[Step]] = {}
    for item in request.session.items:
        step = getattr(item, "callspec", None) and item.callspec.params.get("step")
        if isinstance(step, Step) and not step.block.not_run:
            pages.setdefault(step.page, []).append(step)
    folders = {page: tmp_path_factory.mktemp("page") for page in pages}
    original = copied(tmp_path_factory.mktemp("original"))
    found: dict[str, str] = {}

    def run_page(page: Path) -> None:
        copy = clone(original, folders[page])
        for step in pages[page]:
            try:
                wrong = attempt(step, copy)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                wrong = str(error) or "an assertion"
            found[str(step)] = found.get(str(step)) or wrong  # a block may say the same twice

    visited: list[Path] = []
    twins: list[tuple[Step, Step]] = []
    for page in sorted(pages, key=lambda page: -len(pages[page])):
        there = next(filter(None, (twins_of(pages[page], pages[other]) for other in visited)), None)
        if there is None:
            visited.append(page)
        else:
            twins += zip(pages[page], there, strict=True)
    for page in visited:
        for step in [step for number, step in enumerate(pages[page]) if alone(pages[page], number)]:
            others = (other for kept in visited if kept != page for other in pages[kept])
            if twin := next((other for other in others if other.does == step.does), None):
                pages[page].remove(step)
                twins.append((step, twin))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_page, visited))
    for step, twin in reversed(twins):  # a twin that was found early may have one itself
        found[str(step)] = found[str(twin)]
    return found


def alone(page: list[Step], number: int) -> bool:
    """Whether a step uses nothing of its page, and nothing that follows names what it makes."""
    command, *files = page[number].does
    made = "outputs/multirun" if " -m " in command else "outputs/"
    return not files and "outputs/" not in command and not any(made in step.does[0] for step in page[number + 1 :])


def twins_of(ours: list[Step], theirs: list[Step]) -> list[Step] | None:
    """For each of a page's steps the same one among another's, in the same order; None where one has none."""
    left = iter(theirs)
    found = [next((other for other in left if other.does == step.does), None) for step in ours]
    return [step for step in found if step is not None] if None not in found else None


def attempt(step: Step, copy: Path) -> str:
    """Run one step in a clone; returns what went wrong."""
    for block in step.first:
        assert block.file is not None
        (copy / block.file).parent.mkdir(parents=True, exist_ok=True)
        (copy / block.file).unlink(missing_ok=True)
        (copy / block.file).write_text(block.text)
    paths = [copy.parent / "installed", copy / "src", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(str(p) for p in paths if p)}
    environment["PYTEST_CURRENT_TEST"] = f"tests/test_docs.py::test_commands_run[{step}]"  # whose seconds these are
    script = re.sub(r"\bmax_steps=\d+", "max_steps=2", step.block.text)
    for words in [[sys.executable, "-c", script]] if step.command is None else runnable(step.command, copy):
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            return f"{shlex.join(words)}\nexit code {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}"
    return ""


@pytest.mark.timeout(1800)  # the first one runs them all
@pytest.mark.parametrize("step", steps(), ids=str)
def test_commands_run(step: Step, request: pytest.FixtureRequest):
    if step.block.not_run:
        pytest.skip(step.block.not_run)
    wrong = request.getfixturevalue("outcomes")[str(step)]
    assert not wrong, wrong


def runnable(command: str, clone: Path) -> list[list[str]]:
    """What to run for a documented command: nothing that reaches for the network or lasts for minutes."""
    words = shlex.split(command)
    if words[0] == "make":
        # An up-to-date stamp, as after `make setup`; then the programs that make would start.
        (clone / ".venv").mkdir(exist_ok=True)
        (clone / ".venv" / ".flowanchor-installed").touch()
        dry = subprocess.run([*words, "--dry-run"], cwd=clone, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
        lines = [shlex.split(line) for line in dry.stdout.splitlines() if re.match(r"\S*python src/\w+\.py", line)]
        return [short(line) for line in lines]
    if words[0] in SCRIPTS:
        return [short(["python", f"src/{SCRIPTS[words[0]]}", *words[1:]])]
    if words[0] == "flowanchor":
        return [[sys.executable, "-m", "flowanchor", words[1], *short([words[0], f"{words[1]}.py", *words[2:]])[2:]]]
    program = Path(words[0]).name
    if program in ("pip", "python", "python3") and "install" in words and "pip" in " ".join(words[:3]):
        local = [word for word in words if (clone / word).is_dir()]
        assert len(local) == 1, f"only a folder of the repository is installed in a test: {command}"
        offline = ["--no-deps", "--no-build-isolation", "--no-index", "--upgrade"]
        target = clone.parent / "installed"
        return [[sys.executable, "-m", "pip", "install", *offline, "--target", str(target), local[0]]]
    assert program in ("python", "python3") and len(words) > 1, f"tests/test_docs.py cannot run this: {command}"
    return [short(words)]


def short(words: list[str]) -> list[str]:
    """`python src/train.py ...` with this interpreter and the shortest training."""
    script = words[1]
    if {"--cfg", "--help", "--info", "--hydra-help"} & set(words):
        return [sys.executable, *words[1:]]
    others = ("backbone=", "backbone.preset=", "backbone.depth=", "backbone.hidden_size=", "experiment=")
    usual = ("backbone=lightningdit", "backbone=imf_dit", "experiment=digits")
    named = [word for word in words if word.startswith(others) and not word.startswith(usual)]
    small = [*SMALL, *["backbone.head_depth=1"] * ("backbone=imf_dit" in words)]
    added = small if Path(script).name == "train.py" and not named else []
    alone = ["data.num_workers=0"] * ("data=image_folder" in words)  # one batch is read at once where it is needed
    return [sys.executable, *words[1:], *added, *alone, *SHORT.get(Path(script).name, [])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{page.name} links to {target}, and {file.name} has no such heading"


def headings(page: Path) -> set[str]:
    """Anchors as code hosts make them: lower case, punctuation dropped, spaces to hyphens."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+?)\s*#*$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pages_are_found():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/plugins.md", "examples/plugin_package/README.md"} <= names


def test_a_step_by_itself_is_checked_on_another_page():
    block = Block("bash", "", 1, None)
    page = [Step(ROOT / "README.md", block, f"x {words}") for words in ("-m a=1,2", "b", "outputs/train/b", "c")]
    assert [alone(page, number) for number in range(4)] == [True, False, False, True]
    page.append(Step(ROOT / "README.md", block, "x outputs/multirun"))
    assert [alone(page, number) for number in range(5)] == [False] * 5


def test_a_page_within_another_is_checked_there():
    block = Block("bash", "a\nb\nc", 1, None)
    file = Block("yaml", "# conf/x/y.yaml\n", 1, None)
    page = [Step(ROOT / "README.md", block, command) for command in "abc"]
    assert twins_of([page[0], page[2]], page) == [page[0], page[2]]
    assert twins_of(page, page[:2]) is None and twins_of([page[2], page[0]], page) is None
    assert twins_of([Step(ROOT / "README.md", block, "a", [file])], page) is None, "a file may change what it does"
