"""`make ablation`: which part of an objective keeps a few-step generator from forgetting the flow, put to the test.

    python benchmarks/ablation.py                    # digits; at most 90 minutes on 2 cores; goes on where it stopped
    python benchmarks/ablation.py --jobs 4           # four runs at once
    python benchmarks/ablation.py --quick            # two rows, a few steps: shows that it runs, writes no page
    python benchmarks/ablation.py --relatives        # the relatives as their authors run them, in a table of their own
    python benchmarks/ablation.py --rows 0 2 9 --folder outputs/fashion --settings data=fashion_mnist data.root=FOLDER
                                                     # another data set: prints its table, writes no page

Every row distils the same teacher, starts from its weights and spends the same number of network evaluations per
sample: a teacher call, an anchor, a shortcut with its tangent and a further opinion of the network count one each, so
that an objective with fewer of them trains for more steps. What comes out is written into docs/results/ablation.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from matplotlib.figure import Figure

from harness import RESULTS, ROOT, machine, markdown, refresh, write_json
from pictures import FOLDER, keep

sys.path.insert(0, str(ROOT / "src"))

from flowanchor.checkpoints import initialise_student, load_model
from flowanchor.interfaces import Batch
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.programs.launch import prepare
from flowanchor.reporting.ablation_figure import ablation_figure
from flowanchor.reporting.runs import read_series

R_EMBEDDER = ("backbone.auxiliary_time_cond=true",)
UNWEIGHTED = "objective.shortcut.weight_power=0.0"
NFE = (1, 2, 4)
REPEATS = 5  # independent sets of samples of each score
RECORD = "ablation_digits.json"
RECORD_OF_RELATIVES = "ablation_relatives.json"


@dataclass(frozen=True)
class Row:
    """An objective: its settings, and how often a step asks a network about a sample."""

    name: str
    words: tuple[str, ...]
    calls: int


# Warm-up and schedule are shares of the run, as they are of the papers' much longer ones.
ROWS = (
    Row("FACM, expanded interval", ("objective=facm",), 3),
    Row("FACM, auxiliary interval", ("objective=facm", "objective/interval=auxiliary", *R_EMBEDDER), 3),
    Row("FACM without anchor", ("objective=facm", "objective/anchor=none"), 2),
    Row("FACM without relaxation", ("objective=facm", "objective.shortcut.relaxation_exponent=null"), 3),
    Row("FACM without clamp", ("objective=facm", "objective.shortcut.clamp=null"), 3),
    Row("FACM without time weight", ("objective=facm", "objective.shortcut.time_weight=false"), 3),
    Row("MeanFlow, r = t share 0", ("objective=meanflow", "objective.shortcut.share=0.0", *R_EMBEDDER), 2),
    Row("MeanFlow, r = t share 0.75", ("objective=meanflow", *R_EMBEDDER), 2),
    Row("MeanFlow, 0.75, without adaptive weight", ("objective=meanflow", UNWEIGHTED, *R_EMBEDDER), 2),
    Row("sCM", ("objective=scm", "objective.shortcut.warmup_steps={quarter}"), 2),
    Row("sCM without warm-up", ("objective=scm", "objective.shortcut.warmup_steps=0"), 2),
    Row(
        "sCM without normalisation",
        ("objective=scm", "objective.shortcut.warmup_steps={quarter}", "objective.shortcut.normalisation=null"),
        2,
    ),
    Row("iMF", ("objective=imf", *R_EMBEDDER), 3),
    Row("iMF without adaptive weight", ("objective=imf", UNWEIGHTED, *R_EMBEDDER), 3),
    Row(
        "iMF whole: guidance as an input, no velocity head",
        ("objective=imf_whole", "backbone.guidance_cond=true", "backbone.disable_label_dropout=false", *R_EMBEDDER),
        5,
    ),
    Row(
        "iMF whole, without adaptive weight",
        (
            "objective=imf_whole",
            "objective.weight_power=0.0",
            "backbone.guidance_cond=true",
            "backbone.disable_label_dropout=false",
            *R_EMBEDDER,
        ),
        5,
    ),
    Row("alpha-Flow", ("objective=alpha_flow", "objective.shortcut.end=0.5", *R_EMBEDDER), 3),
    Row(
        "alpha-Flow without adaptive weight",
        ("objective=alpha_flow", "objective.shortcut.end=0.5", UNWEIGHTED, *R_EMBEDDER),
        3,
    ),
    Row(
        "MeanFlow, decoupled",
        ("objective=meanflow", "objective/interval=decoupled", "objective.shortcut.share=0.5", UNWEIGHTED),
        2,
    ),
    Row(
        "MeanFlow, gated",
        ("objective=meanflow", "objective/interval=gated", "objective.shortcut.share=0.5", UNWEIGHTED),
        2,
    ),
)

# FACM beside its relatives as their authors run them: a table of its own, since the first was measured before.
RELATIVES = tuple(
    row
    for row in ROWS
    if row.name in (ROWS[0].name, "MeanFlow, r = t share 0.75")
    or row.name.startswith(("iMF whole", "alpha-Flow", "MeanFlow, decoupled", "MeanFlow, gated"))
)


@dataclass
class Ablation:
    """The whole sweep in one folder."""

    folder: Path
    budget: int
    seeds: int
    jobs: int
    samples: int
    teacher_steps: int
    rows: tuple[Row, ...]
    settings: tuple[str, ...] = ()

    def steps(self, row: Row) -> int:
        return self.budget // row.calls

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """One of the programs, on one thread, with what it says kept for the message of a failure."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "src" / program), *words]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def teacher(self) -> Path:
        """Train the teacher, unless it is there."""
        folder = self.folder / "teacher"
        done = self.run(
            "train.py", "experiment=digits_teacher", f"trainer.max_steps={self.teacher_steps}",
            "callbacks.sample_grid=null", f"hydra.run.dir={folder}", *self.settings,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        return folder

    def measure(self, row: Row, seed: int, teacher: Path) -> dict[str, Any]:
        """Train and evaluate one row with one seed; finished parts are found and kept."""
        steps = self.steps(row)
        folder = self.folder / "runs" / f"{_slug(row.name)}_{seed}"
        words = [word.format(quarter=steps // 4) for word in row.words]
        trained = self.run(
            "train.py", "experiment=digits_facm", *words, f"teacher.checkpoint={teacher}", f"seed={seed}",
            f"trainer.max_steps={steps}", "callbacks.sample_grid=null", "callbacks.best=null", "log_every_n_steps=10",
            "trainer.limit_val_batches=0", "callbacks.last.every_n_train_steps=100", f"hydra.run.dir={folder}",
            *self.settings,
        )  # fmt: skip
        broke = trained.returncode != 0 and "was not finite" in trained.stderr
        if trained.returncode and not broke:
            raise SystemExit(f"{row.name}, seed {seed}: {trained.stderr}")
        found: dict[str, Any] = {"row": row.name, "seed": seed, "steps": steps, "broke": broke, "fd": {}}
        if not broke:
            done = self.run(
                "eval.py", f"checkpoint={folder}", f"nfe={list(NFE)}".replace(" ", ""), "seed=0",
                f"num_samples={self.samples}", f"repeats={REPEATS}", f"hydra.run.dir={folder / 'score'}",
            )  # fmt: skip
            if done.returncode and "not finite" not in done.stderr:
                raise SystemExit(f"{row.name}, seed {seed}: {done.stderr}")
            if done.returncode == 0:
                report = json.loads((folder / "score" / "metrics.json").read_text())
                found["fd"] = {str(r["nfe"]): r["fd_at_floor_n"] for r in report["results"]}
                found["floor"] = report["floor"]["fd"]
        logged = folder / "csv" / "metrics.csv"
        series = read_series(logged) if logged.is_file() else {}
        found["curves"] = {
            name: series[key]
            for name, key in (("loss", "train/loss"), ("tangent_norm", "train/tangent_norm"))
            if key in series
        }
        print(f"{row.name}, seed {seed}: {found['fd'] or 'no score'}", flush=True)
        return found

    def reference(self, teacher: Path) -> dict[str, Any]:
        """The teacher itself, by Euler steps and by midpoint steps; one evaluation is Euler's by either."""
        found: dict[str, Any] = {}
        for name, solver, nfe in (("fd", "euler", "[1,2,4,50]"), ("midpoint", "midpoint", "[2,4]")):
            folder = teacher / ("score" if name == "fd" else "score_midpoint")
            self.run(
                "eval.py", f"checkpoint={teacher}", "sampler=flow", f"sampler.solver={solver}", f"nfe={nfe}",
                f"num_samples={self.samples}", f"repeats={REPEATS}", f"hydra.run.dir={folder}",
            )  # fmt: skip
            report = json.loads((folder / "metrics.json").read_text())
            found[name] = {str(r["nfe"]): r["fd_at_floor_n"] for r in report["results"]}
            found.setdefault("floor", report["floor"])
        return found

    def all(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        teacher = self.teacher()
        reference = self.reference(teacher)
        todo = [(row, seed) for seed in range(self.seeds) for row in self.rows]
        with ThreadPoolExecutor(self.jobs) as pool:
            return reference, list(pool.map(lambda job: self.measure(*job, teacher), todo))


def measure_costs(rows: tuple[Row, ...], teacher: Path, rounds: int = 9) -> dict[str, float]:
    """CPU seconds of forward and backward on a batch of 64, median; the rows take turns in this process."""
    torch.set_num_threads(1)
    prepare()
    model, cases = load_model(teacher), {}
    for row in rows:
        GlobalHydra.instance().clear()
        with initialize_config_module("flowanchor.conf", version_base="1.3"):
            words = [word.format(quarter=1) for word in row.words]
            cfg = compose("train", overrides=["experiment=digits_facm", *words])
        student = instantiate(cfg.backbone)
        initialise_student(student, teacher)
        velocity = CheckpointVelocity.of_network(model.backbone, Guidance())
        cases[row.name] = (student.train(), instantiate(cfg.objective, _convert_="all"), velocity, instantiate(cfg.jvp))
    batch = Batch(torch.randn(64, 1, 8, 8), torch.arange(64) % 10)
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(rounds + 1):
        for name, (student, objective, velocity, engine) in cases.items():
            start = time.process_time()
            objective(student, batch, velocity, engine).loss.backward()
            if number:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(
    rows: tuple[Row, ...], found: list[dict[str, Any]], reference: dict[str, Any], costs: dict[str, float]
) -> str:
    """A line per row: mean and spread over the seeds, runs that failed, cost per step against the first row."""
    worst = reference["fd"]["1"]
    lines = []
    for row in rows:
        own = [f for f in found if f["row"] == row.name]
        cells = [_spread([f["fd"][str(nfe)] for f in own if str(nfe) in f["fd"]]) for nfe in NFE]
        broke = sum(f["broke"] or not f["fd"] for f in own)
        useless = sum(f["fd"].get("1", math.inf) >= worst for f in own) - broke
        cost = costs[row.name] / costs[rows[0].name]
        lines.append(
            [
                row.name,
                str(own[0]["steps"]),
                *cells,
                f"{broke} of {len(own)}",
                f"{useless} of {len(own)}",
                f"{cost:.2f}",
            ]
        )
    solvers = {"teacher, Euler steps": reference["fd"]}
    if "midpoint" in reference:  # earlier records have none
        solvers["teacher, midpoint steps"] = {"1": reference["fd"]["1"], **reference["midpoint"]}
    teacher = [[name, "", *(f"{fd[str(nfe)]:.2f}" for nfe in NFE), "", "", ""] for name, fd in solvers.items()]
    header = ("objective", "steps", *(f"NFE {nfe}" for nfe in NFE), "diverged", "no better", "cost per step")
    return markdown(header, [*lines, *teacher])


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the objectives on digits.")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "ablation")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=1800, help="network evaluations per sample of a batch")
    parser.add_argument("--relatives", action="store_true", help="FACM and its relatives: their own table and record")
    parser.add_argument("--rows", type=int, nargs="+", help="these rows only, counted from 0; refreshes nothing")
    parser.add_argument(
        "--settings", nargs="+", default=[], help="for every training, such as data=; refreshes nothing"
    )
    parser.add_argument("--table", action="store_true", help="refresh page and figure from the record; run nothing")
    parser.add_argument("--quick", action="store_true", help="two rows, one seed, a few steps; refreshes nothing")
    arguments = parser.parse_args()
    rows, folder = RELATIVES if arguments.relatives else ROWS, arguments.folder.absolute()
    place = RECORD_OF_RELATIVES if arguments.relatives else RECORD
    if arguments.rows:
        rows = tuple(ROWS[number] for number in arguments.rows)
    if arguments.quick:
        rows, folder = (
            tuple(row for row in ROWS if row.name in (ROWS[0].name, "sCM")),
            folder.with_name("ablation_quick"),
        )
        shutil.rmtree(folder, ignore_errors=True)
        sweep = Ablation(folder, 12, 1, arguments.jobs, 60, 4, rows)
    else:
        sweep = Ablation(folder, arguments.budget, arguments.seeds, arguments.jobs, 1000, 3000, rows)
        sweep.settings = tuple(arguments.settings)
    if arguments.table:
        record = json.loads((RESULTS / place).read_text())
        rows = tuple(row for row in rows if row.name in record["cpu_seconds"])  # those that were measured
    else:
        reference, found = sweep.all()
        costs = measure_costs(rows, folder / "teacher")
        record = {"machine": machine(), "teacher": reference, "cpu_seconds": costs, "runs": found}
    text = page(rows, record, sweep.budget)
    print(text)
    if arguments.quick or arguments.rows or arguments.settings:
        return
    if not arguments.table:
        write_json(RESULTS / place, record)
    if arguments.relatives:
        refresh(ROOT / "docs" / "results" / "ablation.md", "relatives table", text)
        return
    keep(figure_of(record), FOLDER / "ablation.png")
    refresh(ROOT / "docs" / "results" / "ablation.md", "ablation table", text)


def figure_of(record: dict[str, Any]) -> Figure:
    """Loss and tangent of every objective that was measured."""
    names = [row.name for row in ROWS if row.name in record["cpu_seconds"]]
    return ablation_figure({name: [run["curves"] for run in record["runs"] if run["row"] == name] for name in names})


def page(rows: tuple[Row, ...], record: dict[str, Any], budget: int) -> str:
    """The table, and how to read it."""
    about, floor = record["machine"], record["teacher"]["floor"]
    seeds = len({run["seed"] for run in record["runs"]})
    midpoint = "A midpoint step takes two evaluations; one alone is Euler's. "
    midpoint = midpoint if "midpoint" in record["teacher"] else ""  # earlier records have none
    return "\n\n".join(
        [
            table(rows, record["runs"], record["teacher"], record["cpu_seconds"]),
            "Frechet distance on the features of a small classifier (FD-digits), mean ± standard deviation over "
            f"{seeds} seeds, of {floor['n']} images with balanced labels; floor (held-out images): "
            f"{floor['fd']:.2f}. Diverged: runs that stopped on values that are not finite. No better: those whose "
            f"one-step distance is at least the teacher's, from whose weights they started. {midpoint}Cost per step: "
            "CPU time of "
            f"forward and backward against the first row, taking turns. {budget} network evaluations per sample of a "
            f"batch of 64. Measured by `make ablation` on {about['cpu']}, torch {about['torch']}, {about['date']}, "
            f"commit {about['commit']}.",
        ]
    )


if __name__ == "__main__":
    main()
