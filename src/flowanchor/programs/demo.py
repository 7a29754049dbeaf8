"""`flowanchor-demo`: the main job from end to end, with the programs that a user would type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import flowanchor
from flowanchor.base.files import write_json, write_whole
from flowanchor.base.signals import Interrupted
from flowanchor.checkpoints import read_checkpoint
from flowanchor.checkpoints.digest import file_digest
from flowanchor.errors import CheckpointError, ConfigError, FlowAnchorError
from flowanchor.programs.commands import demo as main
from flowanchor.reporting.demo_report import Demo

SCRIPTS = {"train": "flowanchor-train", "eval": "flowanchor-eval"}


class Parts:
    """Runs the demo's commands one after the other, and keeps them and their times for the report.

    Times are kept in a file, so that the report of a repeated demo still tells those of the parts that it reuses.
    """

    def __init__(self, record: Path) -> None:
        self.record = record
        self.commands: list[str] = []
        self.seconds: dict[str, float] = {}
        self._started: list[subprocess.Popen[str]] = []
        self._earlier: dict[str, float] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}

    def run(self, title: str, name: str, arguments: Sequence[str], finished: bool = False, margin: str = "   ") -> None:
        """Run one program, showing what it prints behind `margin`, unless it finished earlier; raises if it fails."""
        command, shown = invocation(name)
        line = shlex.join([*shown, *arguments])
        self.commands.append(line)
        if finished:
            self.seconds[title] = self._earlier.get(title, 0.0)
            print(f"\n== {title}\n   finished earlier", flush=True)
            return
        print(f"\n== {title}\n$ {line}", flush=True)
        start = time.perf_counter()
        width = max(120, shutil.get_terminal_size().columns - 3)  # tables of the programs, which see a pipe
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": str(width)}
        # A second thread gains little on networks this small, and costs many times its gain where cores are shared.
        environment.setdefault("OMP_NUM_THREADS", "1")
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            errors="replace", env=environment,
        )  # fmt: skip
        self._started.append(process)
        try:
            _show(process, margin)
        except Interrupted as stop:
            self.stop(stop.signum)
            _show(process, margin)
            raise
        if process.wait() != 0:
            raise FlowAnchorError(
                f"The demo stopped in its part '{title}' (exit code {process.returncode}): mend what the lines above "
                "say, and run the same command again to go on."
            )
        self.seconds[title] = time.perf_counter() - start
        self._earlier[title] = self.seconds[title]
        write_json(self.record, self._earlier)
        print(f"   {title}: {self.seconds[title]:.0f} s", flush=True)

    def stop(self, signum: int) -> None:
        """Pass a signal on to the programs that run: each ends as if it had been told itself."""
        for process in self._started:
            process.send_signal(signum)  # nothing, where it has ended


def _show(process: subprocess.Popen[str], margin: str) -> None:
    assert process.stdout is not None
    for output in process.stdout:
        print(f"{margin}{output.rstrip()}", flush=True)


def invocation(name: str) -> tuple[list[str], list[str]]:
    """How to start a program with this interpreter, and how a user would type it."""
    script = Path(flowanchor.__file__).parent.parent / f"{name}.py"
    if script.is_file():  # a checkout
        try:
            shown = script.relative_to(Path.cwd())
        except ValueError:
            shown = script
        return [sys.executable, str(script)], ["python", str(shown)]
    installed = Path(sys.executable).with_name(SCRIPTS[name])
    if installed.is_file():
        return [str(installed)], [SCRIPTS[name]]
    return [sys.executable, "-m", "flowanchor", name], [SCRIPTS[name]]


# ------------------------------------------------------------------------------------------------------------- parts


def _train(parts: Parts, title: str, folder: Path, settings: DictConfig, cfg: DictConfig, more: Sequence[str]) -> None:
    steps = settings.quick_steps if cfg.quick else settings.steps
    length = [] if steps is None else [f"trainer.max_steps={steps}", f"trainer.val_check_interval={min(500, steps)}"]
    arguments = [f"experiment={settings.experiment}", *more, f"seed={cfg.seed}", *length]
    arguments += ["log_every_n_steps=20", *settings.overrides]
    finished = steps is not None and _trained_steps(folder) >= steps
    parts.run(title, "train", [*arguments, f"hydra.run.dir={folder}"], finished)


def _evaluate(
    parts: Parts,
    title: str,
    run: Path,
    folder: Path,
    sampler: Sequence[str],
    nfe: list[int],
    cfg: DictConfig,
    margin: str = "   ",
) -> None:
    budgets = "nfe=[" + ",".join(map(str, nfe)) + "]"
    arguments = [f"checkpoint={run}", *sampler, budgets, f"num_samples={cfg.num_samples}", f"seed={cfg.seed}"]
    arguments += [
        f"repeats={1 if cfg.quick else cfg.repeats}",
        "save_samples=true",
        *cfg.evaluation.overrides,
        f"hydra.run.dir={folder}",
    ]
    parts.run(title, "eval", arguments, finished=_evaluated(run, folder, nfe, cfg), margin=margin)


def _trained_steps(folder: Path) -> int:
    try:
        return int(read_checkpoint(folder)["flowanchor"]["step"])
    except CheckpointError:
        return 0


def _evaluated(run: Path, folder: Path, nfe: list[int], cfg: DictConfig) -> bool:
    """Whether `folder` holds this evaluation of this very checkpoint."""
    file = folder / "metrics.json"
    if not file.is_file():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        settings, done = found["settings"], [row["nfe"] for row in found["results"]]
        repeats = 1 if cfg.quick else int(cfg.repeats)
        wanted = (file_digest(run / "checkpoints" / "last.ckpt")[:12], int(cfg.num_samples), int(cfg.seed), repeats)
        same = tuple(settings.get(key) for key in ("checkpoint_hash", "num_samples", "seed", "repeats")) == wanted
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return same and done == nfe and all((folder / "samples" / f"nfe{n}.npz").is_file() for n in nfe)


def _forget_other_teacher(student: Path, teacher: Path) -> None:
    """A student of another teacher cannot be continued: remove its run. Remember whose student this one is."""
    digest = file_digest(teacher / "checkpoints" / "last.ckpt")
    note = student / "teacher_digest.txt"
    if student.is_dir() and not (note.is_file() and note.read_text(encoding="utf-8") == digest):
        print(f"\n   {student} is the student of another teacher: starting it anew", flush=True)
        shutil.rmtree(student)
    write_whole(note, digest)


# -------------------------------------------------------------------------------------------------------------- whole


def demo(cfg: DictConfig) -> None:
    """Train, distil, evaluate, report."""
    if cfg.num_samples < 10:
        raise ConfigError(f"num_samples={cfg.num_samples} is too few to compare anything: give at least 10.")
    folder, start, kind = Path(cfg.folder), time.perf_counter(), "_quick" if cfg.quick else ""
    runs = {model: folder / "runs" / f"{model}{kind}" for model in ("teacher", "facm")}
    evaluations = {
        name: folder / "evaluations" / f"{name}{kind}" for name in ("teacher", "teacher_midpoint", "facm")
    }  # fmt: skip
    if cfg.fresh:
        for path in (*runs.values(), *evaluations.values()):
            shutil.rmtree(path, ignore_errors=True)
    parts = Parts(folder / "runs" / f"seconds{kind}.json")

    _train(parts, "teacher", runs["teacher"], cfg.teacher, cfg, [])
    _forget_other_teacher(runs["facm"], runs["teacher"])

    def measure_teacher() -> None:
        for name, solver, nfe in (("", "euler", cfg.teacher.nfe), ("_midpoint", "midpoint", cfg.teacher.midpoint_nfe)):
            _evaluate(
                parts, f"evaluation of the teacher{name and ' by midpoint steps'}", runs["teacher"],
                evaluations[f"teacher{name}"], ["sampler=flow", f"sampler.solver={solver}"], [int(n) for n in nfe], cfg,
                "   | ",
            )  # fmt: skip

    with ThreadPoolExecutor(1) as beside:  # the teacher is measured on a second core while the student trains
        measured = beside.submit(measure_teacher)
        try:
            _train(parts, "FACM student", runs["facm"], cfg.student, cfg, [f"teacher.checkpoint={runs['teacher']}"])
            measured.result()
        except Interrupted as stop:
            parts.stop(stop.signum)
            raise
    _evaluate(
        parts, "evaluation of the student", runs["facm"], evaluations["facm"], ["sampler=consistency"],
        [int(n) for n in cfg.student.nfe], cfg,
    )  # fmt: skip

    spent = time.perf_counter() - start
    settings = {"seed": cfg.seed, "images per evaluation": cfg.num_samples, "quick": cfg.quick}
    settings |= {f"{model} trained for": f"{_trained_steps(path)} steps" for model, path in runs.items()}
    settings |= {f"{key}.{k}": v for key in ("teacher", "student") for k, v in _plain(cfg[key]).items() if v}
    report = Demo(
        folder=folder,
        runs=runs,
        evaluations=evaluations,
        seconds=parts.seconds | {"this call": spent},
        settings=settings,
        commands=parts.commands,
        quick=cfg.quick,
    )
    bars = report.assemble()
    print("\n== bars" + (" (a quick run is far too short for them)" if cfg.quick else ""))
    for bar in bars:
        print(f"   {bar}")
    print(f"\n   {spent:.0f} s in this call; report: {folder / 'report.html'}", flush=True)


def _plain(settings: DictConfig) -> dict[str, object]:
    values = OmegaConf.to_container(settings, resolve=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


if __name__ == "__main__":
    main()
