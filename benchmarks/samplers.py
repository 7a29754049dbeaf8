"""Which sampler a student should have beyond two calls, and what distillation brings at all, on two data sets.

    python benchmarks/samplers.py --data digits            # train what is missing, score, write the tables
    python benchmarks/samplers.py --data fashion_mnist     # needs the files of data=fashion_mnist
    python benchmarks/samplers.py --table                  # the tables from the records; runs nothing

A teacher and three FACM students, by the recipes (of digits, the teacher and the student of seed 0 are those that come
with the package). Every candidate is scored on the student of seed 0; the best one is chosen there and reported on the
two others, beside the teacher by Euler and by midpoint steps at the same number of calls. Five sets of samples, whose
noise all evaluations share, so that differences are taken set by set.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

sys.path.insert(0, str(ROOT / "src"))

from flowanchor import compose
from flowanchor.programs.evaluate import evaluate

NFE = (1, 2, 4, 8)
SEEDS = (0, 1, 2)  # of the students' training; the first one chooses
SETS = 5
SAMPLES = 1000
RECIPES = {"digits": "digits", "fashion_mnist": "fashion"}
SHIPPED_RUNS = {"digits": {"teacher": "digits_teacher", "student_0": "digits"}}  # runs of these recipes that come along
PAGE = ROOT / "docs" / "samplers.md"
SHIPPED = "jumps, fresh noise"


@dataclass(frozen=True)
class Candidate:
    """A sampler of students: its name in the tables, and what is typed for it."""

    name: str
    words: tuple[str, ...]


JUMP_FLOW = ("sampler=jump_flow",)
CANDIDATES = (
    Candidate(SHIPPED, ("sampler=consistency",)),
    Candidate("jump, flow, jump", JUMP_FLOW),
    Candidate("the same, 0.1 of the noise kept", (*JUMP_FLOW, "sampler.kept_noise=0.1")),
    Candidate("jumps, 0.2 of the noise kept", ("sampler=consistency", "sampler.kept_noise=0.2")),
    Candidate("anchor alone, midpoint", ("sampler=flow", "sampler.solver=midpoint")),
)
REPORTED = CANDIDATES[:2]  # what the other seeds are scored with, besides the chosen one
TEACHER = (
    Candidate("teacher, Euler", ("sampler=flow", "sampler.solver=euler")),
    Candidate("teacher, midpoint", ("sampler=flow", "sampler.solver=midpoint")),
)


@dataclass
class Study:
    """One data set's runs and scores in a folder; what is finished is found and kept."""

    data: str
    folder: Path
    settings: tuple[str, ...] = ()
    sets: int = SETS
    samples: int = SAMPLES
    seeds: tuple[int, ...] = SEEDS

    def train(self, name: str, *words: str) -> Path:
        shipped = SHIPPED_RUNS.get(self.data, {}).get(name)
        if shipped is not None and not self.settings:
            return ROOT / "src" / "flowanchor" / "shipped" / shipped
        folder = self.folder / name
        if not (folder / "checkpoints" / "last.ckpt").is_file() or not (folder / "finished").is_file():
            print(f"training {name}", flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [
                sys.executable,
                str(ROOT / "src" / "train.py"),
                *words,
                *self.settings,
                f"hydra.run.dir={folder}",
            ]
            done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            (folder / "finished").touch()
        return folder

    def score(self, name: str, run: Path, candidate: Candidate) -> dict[str, list[float]]:
        """Calls -> the distance of each set."""
        out = self.folder / "scores" / name / "_".join(word.partition("=")[2] for word in candidate.words)
        nfe = [n for n in NFE if n > 1 or "midpoint" not in candidate.name]
        if not (out / "finished").is_file():
            print(f"{name}: {candidate.name}", flush=True)
            words = f"nfe={nfe}".replace(" ", "")
            cfg = compose(
                f"checkpoint={run}", *candidate.words, words, f"num_samples={self.samples}", f"repeats={self.sets}",
                "seed=0", program="eval",
            )  # fmt: skip
            out.mkdir(parents=True, exist_ok=True)
            evaluate(cfg, out)
            (out / "finished").touch()
        results = json.loads((out / "metrics.json").read_text())["results"]
        return {str(r["nfe"]): r["sets"]["fd"] for r in results}

    def all(self) -> dict[str, Any]:
        """Train, score, choose."""
        torch.set_num_threads(1)
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = RECIPES[self.data]
        teacher = self.train("teacher", f"experiment={recipe}_teacher")
        students = [
            self.train(f"student_{seed}", f"experiment={recipe}_facm", f"teacher.checkpoint={teacher}", f"seed={seed}")
            for seed in self.seeds
        ]
        found: dict[str, Any] = {c.name: self.score("teacher", teacher, c) for c in TEACHER}
        choosing = {c.name: self.score("student_0", students[0], c) for c in CANDIDATES}
        chosen = choose(choosing)
        reported = {c.name: c for c in (*REPORTED, *(c for c in CANDIDATES if c.name == chosen))}
        others = [
            {name: self.score(f"student_{seed}", run, c) for name, c in reported.items()}
            for seed, run in zip(self.seeds[1:], students[1:], strict=True)
        ]
        return {"data": self.data, "teacher": found, "choosing": choosing, "chosen": chosen, "reported": others}


def choose(found: dict[str, dict[str, list[float]]]) -> str:
    """The sampler of the least mean distance over all calls, of those that are asked at one call."""
    whole = {name: scores for name, scores in found.items() if set(scores) == {str(n) for n in NFE}}
    return min(whole, key=lambda name: statistics.fmean(statistics.fmean(sets) for sets in whole[name].values()))


def paired(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean and standard error of `after - before`, set by set."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def never_rises(scores: dict[str, list[float]]) -> bool:
    """Whether the mean distance rises from no number of calls to the next by more than the paired standard error."""
    steps = [paired(scores[str(a)], scores[str(b)]) for a, b in zip(NFE, NFE[1:], strict=False)]
    return all(mean <= error for mean, error in steps)


def table(record: dict[str, Any]) -> str:
    """A line per sampler and network."""
    lines = [_line(name, "", scores) for name, scores in record["teacher"].items()]
    lines += [_line(name, "seed 0 (chooses)", scores) for name, scores in record["choosing"].items()]
    for seed, found in zip(SEEDS[1:], record["reported"], strict=False):  # fewer, where --students said so
        lines += [_line(name, f"seed {seed}", scores) for name, scores in found.items()]
    steps = [f"{a} to {b} calls" for a, b in zip(NFE, NFE[1:], strict=False)]
    return markdown(("sampler", "student", *(f"{n} calls" if n > 1 else "1 call" for n in NFE), *steps), lines)


def _line(name: str, network: str, scores: dict[str, list[float]]) -> list[str]:
    cells = [f"{statistics.fmean(scores[str(n)]):.2f}" if str(n) in scores else "" for n in NFE]
    for a, b in zip(NFE, NFE[1:], strict=False):
        known = str(a) in scores and str(b) in scores
        cells.append("{:+.2f} ± {:.2f}".format(*paired(scores[str(a)], scores[str(b)])) if known else "")
    return [name, network, *cells]


def page(record: dict[str, Any]) -> str:
    about = record["machine"]
    falls = [
        f"seed {seed}: {'never rises' if never_rises(found[record['chosen']]) else 'rises'}"
        for seed, found in zip(SEEDS[1:], record["reported"], strict=False)
    ]
    return "\n\n".join(
        [
            table(record),
            f"FD-{record['data']}, mean of {SETS} sets of {SAMPLES:,} samples; last columns: paired difference and its "
            f"standard error. Chosen on seed 0: *{record['chosen']}*; {', '.join(falls)}. "
            f"`python benchmarks/samplers.py --data {record['data']}` on {about['cpu']}, torch {about['torch']}, "
            f"{about['date']}, commit {about['commit']}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare samplers of FACM students.")
    parser.add_argument("--data", choices=list(RECIPES), default="digits")
    parser.add_argument("--folder", type=Path, help="of runs and scores; default: outputs/samplers/DATA")
    parser.add_argument("--settings", nargs="+", default=[], help="for every training; refreshes nothing")
    parser.add_argument("--students", type=int, default=len(SEEDS), help="how many; the first one chooses")
    parser.add_argument("--quick", action="store_true", help="a few steps and samples; refreshes nothing")
    parser.add_argument("--table", action="store_true", help="refresh the page from the records; run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        for data in RECIPES:
            if (RESULTS / f"samplers_{data}.json").is_file():
                _refresh(json.loads((RESULTS / f"samplers_{data}.json").read_text()))
        return
    folder = (arguments.folder or ROOT / "outputs" / "samplers" / arguments.data).absolute()
    study = Study(arguments.data, folder, tuple(arguments.settings))
    if arguments.quick:
        quick = ("trainer.max_steps=3", "callbacks.sample_grid=null")
        study = Study(arguments.data, folder.with_name(f"{folder.name}_quick"), (*arguments.settings, *quick), 2, 20)
    study.seeds = SEEDS[: arguments.students]
    record = {"machine": machine(), **study.all()}
    print(page(record))
    if not arguments.quick and not arguments.settings:
        write_json(RESULTS / f"samplers_{arguments.data}.json", record)
        _refresh(record)


def _refresh(record: dict[str, Any]) -> None:
    refresh(PAGE, f"samplers on {record['data']}", page(record))


if __name__ == "__main__":
    main()
