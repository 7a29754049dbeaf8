"""How the code is built, in numbers: what a change of its structure is held against.

    python benchmarks/structure.py [--root CHECKOUT] [--still] [--draw PICTURE]

Static, of src/flowanchor and plugins/: lines, circles of imports (groups of files that import each other, inside
functions too, type annotations aside), arrows that point up (from a room to one that stands above it, ROOMS), imports
inside functions, `type: ignore`, probes (`hasattr`, and `getattr` with a literal name), members of the two largest
contracts. Moving (left out by --still): the files of the project in which some function runs while a tiny network is
sampled, evaluated and trained on one batch, from the request to the answer, without what the start of a program does,
and the pairs of files of which one hands over to the other on the way.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# From the ground up. A file belongs to the first room whose prefix it has; what is not listed stands at the top.
ROOMS = [
    ("ground", ["flowanchor.errors", "flowanchor.base", "flowanchor.graphs.capture", "flowanchor.graphs.step_number"]),
    ("contracts", ["flowanchor.interfaces", "flowanchor.drawing", "flowanchor.conditioning", "flowanchor.request",
                   "flowanchor.deferred", "flowanchor.weights", "flowanchor.text.base", "flowanchor.velocity",
                   "flowanchor.plain_network", "flowanchor.guided"]),
    ("reporting", ["flowanchor.reporting", "flowanchor.provenance"]),
    ("tangents", ["flowanchor.jvp"]),
    ("jumps", ["flowanchor.sampling", "flowanchor.jumps"]),
    ("data", ["flowanchor.data", "flowanchor.latents", "flowanchor.captions", "flowanchor.encoded",
              "flowanchor.encoding", "flowanchor.codecs", "flowanchor.text"]),
    ("checkpoints", ["flowanchor.checkpoints", "flowanchor.exports", "flowanchor.formats", "flowanchor.ema_posthoc"]),
    ("generation", ["flowanchor.generation"]),
    ("evaluation", ["flowanchor.metrics", "flowanchor.evaluation"]),
    ("training", ["flowanchor.module", "flowanchor.ema", "flowanchor.callbacks", "flowanchor.strategies",
                  "flowanchor.graphs", "flowanchor.optimizers", "flowanchor.optimizer_settings",
                  "flowanchor.skipped_steps", "flowanchor.recompute", "flowanchor.run_lock", "flowanchor.parts"]),
    ("plugins", ["flowanchor.plugins"]),
    ("play", ["flowanchor.play"]),
    ("programs", ["flowanchor.programs", "flowanchor.testing", "flowanchor.__main__", "flowanchor"]),
]  # fmt: skip

WALK = r"""
import sys, threading
ROOT = sys.argv.pop(1)
seen = []
def here(frame, event, argument):
    if event == "call":
        file = frame.f_code.co_filename
        runs = frame.f_code.co_flags & 1  # a function: not the body of a module or class that is being imported
        if runs and file.startswith(ROOT) and ".venv" not in file and (not seen or seen[-1] != file):
            seen.append(file)
def walked(function, *arguments, **named):
    del seen[:]
    sys.setprofile(here); threading.setprofile(here)
    try:
        return function(*arguments, **named)
    finally:
        sys.setprofile(None); threading.setprofile(None)
        over, files = set(zip(seen, seen[1:])), sorted(f[len(ROOT) + 1:] for f in set(seen))
        print("FILES", len(files), "HANDOVERS", len(over), *files, flush=True)
"""
STEP = (
    WALK
    + r"""
import lightning.pytorch as pl
from flowanchor.module import FlowModule
own, count = FlowModule.training_step, [0]
def training_step(self, batch, index):
    count[0] += 1
    return walked(own, self, batch, index) if count[0] == 2 else own(self, batch, index)
FlowModule.training_step = training_step
from flowanchor.programs.train import main
main()
"""
)
PROGRAM = (
    WALK
    + r"""
import importlib
name = sys.argv.pop(1)
module = importlib.import_module(f"flowanchor.programs.{name}")
main = getattr(module, "main")
inner = {"sample": "sample", "evaluate": "evaluate"}[name]
own = getattr(module, inner)
setattr(module, inner, lambda *a, **k: walked(own, *a, **k))
sys.argv[0] = name + ".py"
from flowanchor.programs import commands
getattr(commands, name)()
"""
)


def files(root: Path) -> dict[str, Path]:
    found = {}
    for package, folder in (("flowanchor", root / "src" / "flowanchor"), ("flowanchor.plugins", root / "plugins")):
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(tree: ast.Module, name: str, known: dict[str, Path]) -> set[tuple[str, bool]]:
    """Modules of the project that a module imports, and whether inside a function; annotations' imports aside."""
    found = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in known else node.module
                if target in known and target != name:
                    found.add((target, inside))
        if isinstance(node, ast.Import):
            found.update((alias.name, inside) for alias in node.names if alias.name in known)
        deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, deeper)

    visit(tree, False)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one file, each of which reaches all others."""

    def reached(start: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            for other in graph[stack.pop()]:
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        return seen

    reach = {name: reached(name) for name in list(graph)}
    groups, placed = [], set()
    for name in sorted(graph):
        group = sorted(other for other in reach[name] if name in reach[other])
        if len(group) > 1 and name not in placed:
            groups.append(group)
            placed.update(group)
    return groups


def room(name: str) -> int:
    best, length = len(ROOMS), -1
    for level, (_, prefixes) in enumerate(ROOMS):
        for prefix in prefixes:
            if (name == prefix or name.startswith(prefix + ".")) and len(prefix) > length:
                best, length = level, len(prefix)
    return best


def still(root: Path) -> dict[str, object]:
    known = files(root)
    graph: dict[str, set[str]] = {name: set() for name in known}
    up, within, ignores, probes = [], 0, 0, 0
    members: dict[str, int] = {}
    for name, file in known.items():
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        ignores += text.count("type: ignore")
        for target, inside in imports(tree, name, known):
            graph[name].add(target)
            within += inside
            if room(target) > room(name):
                up.append(f"{name} -> {target}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
                probes += node.func.id == "hasattr" or (node.func.id == "getattr" and literal)
            if isinstance(node, ast.ClassDef) and node.name in ("Backbone", "Shortcut", "Weighted"):
                if not name.startswith("flowanchor.plugins"):
                    own = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AnnAssign)]
                    members[node.name] = len([n for n in own if getattr(n, "name", "") != "__init__"])
    return {
        "lines": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in known.values()),
        "files": len(known),
        "circles": circles(graph),
        "up": sorted(up),
        "imports inside functions": within,
        "type: ignore": ignores,
        "probes": probes,
        "members": members,
    }


def moving(root: Path) -> dict[str, dict[str, object]]:
    tiny = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=16",
            "trainer.max_steps=3", "trainer.limit_val_batches=0", "callbacks.sample_grid=null", "callbacks.best=null",
            "name=walk", "threads=1"]  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, script, words in (
            ("training batch", STEP, ["objective=facm", *tiny]),
            ("sampling request", PROGRAM, ["sample", "checkpoint=outputs/train/walk", "num_samples=4"]),
            ("evaluation", PROGRAM, ["evaluate", "checkpoint=outputs/train/walk", "metric=random", "num_samples=64",
                                     "nfe=[2]"]),
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", script, str(root), *words], cwd=folder, capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            lines = [line for line in done.stdout.splitlines() if line.startswith("FILES")]
            if done.returncode or not lines:
                raise SystemExit(f"{title} failed:\n{done.stdout}{done.stderr}")
            _, count, _, handovers, *names = lines[-1].split()
            found[title] = {"files": int(count), "hand-overs": int(handovers), "names": names}
    return found


def figure_of(root: Path) -> Any:
    """The rooms, each above what it stands on, and the imports between them; red: one that points up."""
    # The counts, which tests want, do without matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    known = files(root)
    arrows: dict[tuple[int, int], int] = {}
    for name, file in known.items():
        text = file.read_text(encoding="utf-8")
        for target, _ in imports(ast.parse(text), name, known):
            pair = room(name), room(target)
            if pair[0] != pair[1]:
                arrows[pair] = arrows.get(pair, 0) + 1
    figure = Figure(figsize=(6.4, 7.13))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    for level, (title, folders) in enumerate(ROOMS):
        inside = ", ".join(folder.removeprefix("flowanchor.") for folder in folders if folder in known)
        axes.add_patch(Rectangle((0, level - 0.3), 5, 0.6, facecolor="#eef3f8", edgecolor="#5b7c99"))
        axes.text(0.1, level + 0.06, f"{title}", weight="bold", va="center")
        axes.text(
            0.1,
            level - 0.17,
            inside if len(inside) < 66 else inside[:62] + " ...",
            va="center",
            fontsize=7,
            color="#555555",
        )
    for (above, below), count in sorted(arrows.items()):
        side, colour = (5, "#5b7c99") if above > below else (0, "#c0392b")
        bend = 0.35 if above > below else -0.35
        axes.annotate(
            "", xy=(side, below + 0.1), xytext=(side, above - 0.1),
            arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.75, "lw": min(0.4 + count / 25, 3.0),
                        "connectionstyle": f"arc3,rad={-bend if above > below else bend}"},
        )  # fmt: skip
    axes.set_xlim(-1.2, 8)
    axes.set_ylim(-0.6, len(ROOMS) - 0.4)
    axes.axis("off")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--still", action="store_true", help="without running anything")
    parser.add_argument("--draw", type=Path, help="a picture of the rooms and their imports (PNG), nothing else")
    chosen = parser.parse_args()
    root = chosen.root.resolve()
    if chosen.draw is not None:
        from pictures import keep  # matplotlib again

        keep(figure_of(root), chosen.draw)
        return
    found = still(root)
    if not chosen.still:
        found["walks"] = moving(root)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
