"""Finding training runs, and the evaluations of them; what is half-written is read as far as it goes."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from flowanchor.base.files import read_note
from flowanchor.base.paths import folder_name
from flowanchor.base.walk import walk
from flowanchor.errors import DataError
from flowanchor.provenance import read_parts
from flowanchor.reporting.measurements import Kind

Series = dict[str, tuple[list[int], list[float]]]  # name -> steps, values

# Settings that tell runs of one kind apart without being what is compared.
REPETITION = ("seed", "name")


@dataclass(frozen=True)
class Score:
    """A line of an evaluation."""

    kind: Kind
    nfe: int | None
    fd: float | None
    spread: float | None = None  # over independent sets of samples, where there were several


@dataclass(frozen=True)
class Run:
    """One training run as its folder tells it."""

    folder: Path
    overrides: tuple[str, ...]  # as typed, without the seed and the name
    seed: int | None
    max_steps: int | None
    series: Series
    name: str | None = None  # as given by name=
    objective: str | None = None  # its class
    results: tuple[Score, ...] = ()  # of its evaluations, the newest last
    picture: Path | None = None  # the newest grid of samples, where there is one
    drawn_alike: tuple[str, ...] = ()  # runs in which these are equal drew their pictures from the same noise
    problems: tuple[str, ...] = ()  # what could not be read

    @property
    def step(self) -> int:
        """The last step of which something was logged; 0 before the first."""
        return max((steps[-1] for steps, _ in self.series.values() if steps), default=0)

    @property
    def skipped(self) -> int:
        """Steps that were skipped because a loss or gradient was not finite."""
        values = self.series.get("train/nonfinite_steps", ([], []))[1]
        return int(max(values, default=0))

    @property
    def state(self) -> str:
        """`finished`, `step N of M`, or `not started`."""
        if not self.series:
            return "nothing logged" if (self.folder / "checkpoints").is_dir() else "not started"
        # Steps are logged every few, and counted from 0: the last one of a finished run is at most that far away.
        logged = self.series.get("train/loss", ([], []))[0]
        gap = max(1, logged[-1] - logged[-2]) if len(logged) > 1 else 1
        if self.max_steps is None or self.max_steps < 0 or self.step + gap >= self.max_steps:
            return "finished"
        return f"step {self.step} of {self.max_steps}"

    def last(self, name: str, share: float = 0.1) -> float | None:
        """Mean of the last `share` of a curve's values that are finite; None where there is none."""
        values = [v for v in self.series.get(name, ([], []))[1] if math.isfinite(v)]
        tail = values[-max(1, round(len(values) * share)) :]
        return sum(tail) / len(tail) if tail else None


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed only."""

    label: str
    runs: list[Run] = field(default_factory=list)
    short: str = ""  # for figures: the label without what goes without saying


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every training run below the folders, with every evaluation below them that names its checkpoint.

    Raises `DataError` for a folder that does not exist, and where none of them holds a run.
    """
    roots = [Path(str(folder)).expanduser() for folder in folders]
    for root in roots:
        if not root.is_dir():
            raise DataError(f"There is no folder {root}: give runs=FOLDER, for example runs=outputs/multirun/NAME.")
    found = _files(roots, "config.yaml", "metrics.json")
    configs = [path for path in found["config.yaml"] if path.parent.name != ".hydra"]
    reports = found["metrics.json"]
    evaluated = [report for path in reports if (report := _read_report(path)) is not None]
    evaluated.sort(key=lambda item: item[0].stat().st_mtime)
    runs = [run for path in configs if (run := _read_run(path, evaluated)) is not None]
    if not runs:
        raise DataError(
            f"There are no runs in {', '.join(map(str, roots))}: give a folder that train.py has written, "
            "for example runs=outputs/multirun/NAME."
        )
    return runs


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Runs by what was asked of them, in the order of their folders; the label says what the others do not share."""
    kinds: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        kinds.setdefault(tuple(sorted(run.overrides)), []).append(run)
    shared = set.intersection(*(set(kind) for kind in kinds)) if len(kinds) > 1 else set()
    owned = [[word for word in kind[0].overrides if word not in shared] for kind in kinds.values()]
    groups = []
    for (kind, members), own in zip(kinds.items(), owned, strict=True):
        members.sort(key=lambda run: (run.seed is None, run.seed))
        label = _label(members, " ".join(own if len(kinds) > 1 else kind) or "default")
        short = _label(members, " ".join(_short(own, owned)) or "default")
        groups.append(Group(label, members, short))
    # Two that become alike keep their whole labels: objective=facm beside teacher=facm.
    alike = {group.short for group in groups if sum(other.short == group.short for other in groups) > 1}
    return [replace(group, short=group.label if group.short in alike else group.short) for group in groups]


def _short(words: Sequence[str], all_words: Sequence[Sequence[str]]) -> Iterable[str]:
    """`objective=facm optimizer.lr=1e-4` as `facm lr=1e-4`.

    A choice of a group is known by its value where every run makes it, a setting by the last part of its name where no
    other setting ends alike.
    """
    keys = {word.partition("=")[0] for own in all_words for word in own}
    for word in words:
        key, equals, value = word.partition("=")
        last = key.rpartition(".")[2]
        if not equals:
            yield word
        elif last == key and _is_choice(value) and all(any(w.split("=")[0] == key for w in own) for own in all_words):
            yield value
        else:
            alone = sum(other.rpartition(".")[2] == last for other in keys) == 1
            yield f"{last if alone else key}={value}"


def _is_choice(value: str) -> bool:
    """Whether a value says by itself what it is: facm does, 0 and true do not."""
    return value[:1].isalpha() and value.lower() not in ("true", "false", "null", "none", "nan", "inf")


def _label(members: Sequence[Run], overrides: str) -> str:
    """The names that were given; what was asked for, where there are none."""
    given = list(dict.fromkeys(run.name for run in members if run.name))
    if len(given) == len(members) <= 3:
        return ", ".join(given)
    return f"{given[0]} ... {given[-1]}" if len(given) == len(members) else overrides


def read_series(path: Path) -> Series:
    """`metrics.csv` as curves; cells that are empty, and a last row that is still being written, are left out."""
    series: Series = {}
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # of a step that is cut off a smaller number would be left
    for row in csv.DictReader(io.StringIO(whole, newline="")):
        step = _number(row.get("step"))
        for name, cell in row.items():
            value = _number(cell)
            if name in (None, "step", "epoch") or value is None or step is None or not math.isfinite(step):
                continue
            steps, values = series.setdefault(name, ([], []))
            steps.append(int(step))
            values.append(value)
    return series


def _files(roots: Sequence[Path], *names: str) -> dict[str, list[Path]]:
    """Files of these names below the folders, through links, each once."""
    found: dict[str, dict[str, Path]] = {name: {} for name in names}
    for entry in (entry for root in roots for entry in walk(root, hidden=True)):
        if entry.name in found:
            found[entry.name].setdefault(os.path.realpath(entry.path), Path(entry.path))
    return {name: sorted(paths.values()) for name, paths in found.items()}


def _read_run(config: Path, evaluated: list[tuple[Path, dict[str, Any]]]) -> Run | None:
    """The run of a folder; None where the folder is that of another program."""
    folder, problems = config.parent, []
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{config.name}: {type(error).__name__}")
        settings = None
    if not isinstance(settings, dict):
        settings = {}
        if not (folder / "csv").is_dir():
            return None
    elif "objective" not in settings or "trainer" not in settings:
        return None
    series: Series = {}
    curves = folder / "csv" / "metrics.csv"
    if curves.is_file():
        series = read_series(curves)
    results = tuple(
        Score(Kind.of(line, report["settings"]), line.get("nfe"), line.get("fd"), (line.get("spread") or {}).get("fd"))
        for path, report in evaluated
        if _belongs(path, report, folder)
        for line in report["results"]
    )
    trainer = settings.get("trainer")
    steps = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
    return Run(
        folder=folder,
        overrides=_overrides(folder, problems),
        seed=settings.get("seed"),
        max_steps=steps if isinstance(steps, int) else None,
        series=series,
        name=settings["name"] if _was_named(folder, settings) else None,
        objective=_class(settings.get("objective")),
        results=results,
        picture=max((folder / "samples").glob("step_*.png"), default=None),  # steps are written with leading zeros
        drawn_alike=_drawing(settings),
        problems=tuple(problems),
    )


def _drawing(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What the pictures of `samples/` were drawn of: seed, rows, columns, and the data that the classes are of."""
    callbacks, data = settings.get("callbacks"), settings.get("data")
    grid = callbacks.get("sample_grid") if isinstance(callbacks, Mapping) else None
    if not isinstance(grid, Mapping) or not isinstance(data, Mapping):
        return ()
    of_grid = [str(grid.get(key)) for key in ("seed", "per_class", "max_classes")]
    return (*of_grid, *(str(data.get(key)) for key in ("_target_", "root", "size", "channels", "num_classes")))


def _overrides(folder: Path, problems: list[str]) -> tuple[str, ...]:
    path = folder / ".hydra" / "overrides.yaml"
    recorded = [part["overrides"] for part in read_parts(folder) if "overrides" in part]
    try:
        words = recorded[-1] if recorded else yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{path.name}: {type(error).__name__}")
        words = []
    found = [str(word) for word in words or []]
    return tuple(word for word in found if word.lstrip("+~").split("=")[0] not in REPETITION)


def _read_report(path: Path) -> tuple[Path, dict[str, Any]] | None:
    report = read_note(path)  # None: an evaluation that is being written
    if report is None or not isinstance(report.get("settings"), dict) or "results" not in report:
        return None
    return path, report


def _belongs(path: Path, report: Mapping[str, Any], folder: Path) -> bool:
    """Whether an evaluation lies in a run's folder, or names a checkpoint in it."""
    if folder.resolve() in path.resolve().parents:
        return True
    checkpoint = report["settings"].get("checkpoint")
    if not checkpoint:
        return False
    # Older evaluations have the path as it was typed, from a folder above their own.
    start = [Path.cwd(), *path.resolve().parents]
    return any(folder.resolve() in (base / checkpoint).resolve().parents for base in start)


def _was_named(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the run's folder is called by a name that somebody gave it."""
    name = settings.get("name")
    return isinstance(name, str) and bool(name) and folder.name == folder_name(name.rpartition("/")[2])


def _class(settings: Any) -> str | None:
    """A short name of what a part of the configuration builds."""
    target = settings.get("_target_") if isinstance(settings, Mapping) else None
    parts = [_class(settings.get(part)) for part in ("anchor", "shortcut")] if target else []
    return "+".join(part for part in parts if part) or (str(target).rpartition(".")[2] if target else None)


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
