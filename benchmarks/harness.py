"""Measuring workloads side by side, and telling about it: bars, tables, JSON with the machine, blocks of the README."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MB = 1e6

# glibc: time is measured with memory that stays with the process (no page faults after the first step, as with a GPU's
# caching allocator); process memory with every larger block returned as soon as it is freed.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
RETURNING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}

# One thread, no GPU, and no messages of the profiler.
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "99"}


@dataclass(frozen=True)
class Reading:
    """What one case cost."""

    cpu_seconds: float  # median over the rounds
    rounds: list[float]
    process_peak: int  # bytes above the idle process
    counted_peak: int  # bytes of live tensors that the step made


@dataclass(frozen=True)
class Row:
    """Figures of a claim, and the bar that none of them may exceed."""

    claim: str
    what: str
    values: tuple[float, ...]
    bar: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        return None if self.bar is None else all(value <= self.bar for value in self.values)

    def cells(self) -> list[str]:
        bar = "" if self.bar is None else f"<= {_fraction(self.bar)}"
        met = {True: "yes", False: "**no**", None: ""}[self.holds]
        return [self.claim, self.what, ", ".join(f"{value:.2f}" for value in self.values), bar, met]


def _fraction(bar: float) -> str:
    return f"1/{round(1 / bar)}" if bar < 0.5 else f"{bar:g}"


@dataclass(frozen=True)
class Claim:
    """The rows of one claim, and everything that was measured for them."""

    rows: list[Row]
    measured: Any


def speed(claim: str, ours: Reading, theirs: Reading, bar: float | None) -> Row:
    """A ratio of CPU seconds."""
    return Row(claim, "CPU time", (ours.cpu_seconds / theirs.cpu_seconds,), bar)


def peak(claim: str, ours: Reading, theirs: Reading, bar: float | None) -> Row:
    """Ratios of peaks, by process memory and by count."""
    ratios = ours.process_peak / theirs.process_peak, ours.counted_peak / theirs.counted_peak
    return Row(claim, "peak: process, counted", ratios, bar)


def readings(workload: str, cases: dict[str, dict[str, Any]], rounds: int) -> dict[str, Reading]:
    """Measure `module:function` of this folder, called with each case's settings."""
    times = seconds(workload, cases, rounds)
    found = memory(workload, cases)
    return {
        name: Reading(statistics.median(taken), taken, found[name]["process"], found[name]["counted"])
        for name, taken in times.items()
    }


def seconds(workload: str, cases: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each round of each case, which take turns."""
    found: dict[str, list[float]] = _ask(
        {"measure": "time", "workload": workload, "cases": cases, "rounds": rounds}, KEEPING
    )
    return found


def memory(workload: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Peaks of one step of each case in bytes, `process` and `counted`."""
    return _ask({"measure": "memory", "workload": workload, "cases": cases}, RETURNING)


def _ask(task: dict[str, Any], environment: dict[str, str]) -> Any:
    """The answer of a fresh worker process, which runs on one thread."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("worker.py")), json.dumps(task)]
    everything = {**os.environ, **environment, **QUIET}
    done = subprocess.run(command, env=everything, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"A measurement failed ({task}):\n{done.stderr}")
    return json.loads(done.stdout)


def together(processes: int, task: dict[str, Any]) -> Any:
    """What the first of so many processes of a gloo group found (ranks.py); each runs on one thread."""
    script = str(Path(__file__).with_name("ranks.py"))
    everything = {**os.environ, **KEEPING, **QUIET}
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        commands = [
            [sys.executable, "-W", "ignore", script, str(rank), str(processes), store, json.dumps(task)]
            for rank in range(processes)
        ]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, env=everything, **pipes) for command in commands]
        try:
            # Read in threads: a process whose pipe nobody empties would stop, and the others with it.
            with ThreadPoolExecutor(processes) as pool:
                outputs = list(pool.map(lambda process: process.communicate(), started))
        finally:
            for process in started:
                process.kill()
    if any(process.returncode for process in started):
        sys.exit(f"A measurement failed ({task}):\n" + "\n".join(error for _, error in outputs))
    return json.loads(outputs[0][0])


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which code; no names of hosts or people."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        cpu = found.group(1) if found else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit that is checked out, with `+` where files differ from it; empty outside a checkout."""

    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", "src", "plugins", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a record; dataclasses become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=asdict) + "\n")


def refresh(path: Path, name: str, text: str) -> None:
    """Replace what stands in a file between the markers `<!-- NAME: ... -->` and `<!-- end of NAME -->`."""
    old = path.read_text()
    pattern = rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->)"
    new, count = re.subn(pattern, lambda found: f"{found[1]}{text}\n{found[2]}", old, flags=re.S)
    if count != 1:
        sys.exit(f"{path.name} has no place for '{name}': it needs the two lines <!-- {name}: ... --> and its end.")
    if new != old:
        path.write_text(new)
