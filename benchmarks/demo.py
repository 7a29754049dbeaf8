"""The README's table: what `make demo` measured last, on this machine.

Run `make demo` first, then `make bench` or this script; `--busy SECONDS` says that the machine had other work
meanwhile, and how many CPU seconds the demo took (user and system, as `time` tells them). Reads
outputs/demo/results.json, writes benchmarks/results/demo_cpu.json with the machine's description, and refreshes the
table and the picture of the README.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "outputs" / "demo"
NAMES = {
    "teacher": "teacher, flow matching",
    "teacher_midpoint": "teacher, flow matching",
    "facm": "FACM student",
}
BEGIN, END = "<!-- demo table: benchmarks/demo.py -->", "<!-- end of demo table -->"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
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
    }


def table(results: list[dict[str, Any]], about: dict[str, Any], seconds: dict[str, float], busy: int = 0) -> str:
    """The results as Markdown, with what has to stand beside a score."""
    metric = results[0]["metric"]
    lines = [
        f"| model | sampler | NFE | {metric} | at the floor's N | precision | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        lines.append(
            f"| {NAMES.get(row['model'], row['model'])} | {row['sampler']} | {row['nfe']} | {_told(row, 'fd')} | "
            f"{_told(row, 'fd_at_floor_n')} | {row['precision']:.2f} | {row['recall']:.2f} |"
        )
    first = results[0]
    times = ", ".join(f"{part} {spent:.0f} s" for part, spent in seconds.items())
    times += f"; other work ran beside it: {busy} CPU seconds in all" if busy else ""
    sets = first.get("repeats") or 1
    repeats = f", means and standard deviations over {sets} independent sets" if sets > 1 else ""
    lines += [
        "",
        f"{first['n']:,} images{repeats}, {first['protocol']} labels, seed {first['seed']}, weights {first['ema']}. "
        f"Floor (held-out real images, N = {first['floor_n']}): {first['floor']:.2f}; a score below it means that "
        "samples lie closer to the training images than unseen real ones do. "
        f"Measured by `make demo` on {about['cores']} cores of {about['cpu']}, torch {about['torch']} ({times}). "
        f"{metric} is a Frechet distance on the features of a small classifier of this data "
        "set and says nothing about other data.",
    ]
    return "\n".join(lines)


def _told(row: dict[str, Any], name: str) -> str:
    """A score with its spread, to the digits that mean something."""
    spread = (row.get("spread") or {}).get(name)
    return f"{row[name]:.2f}" if spread is None else f"{row[name]:.2f} ± {spread:.2f}"


def main() -> None:
    results_file = DEMO / "results.json"
    if not results_file.is_file():
        sys.exit(f"There is no {results_file.relative_to(ROOT)}: run `make demo` first.")
    results = json.loads(results_file.read_text())
    seconds = json.loads((DEMO / "runs" / "seconds.json").read_text())
    about = machine()
    busy = int(sys.argv[2]) if sys.argv[1:2] == ["--busy"] else 0
    record = {"machine": about, "seconds": seconds, "cpu_seconds": busy or None, "results": results}
    (ROOT / "benchmarks" / "results" / "demo_cpu.json").write_text(json.dumps(record, indent=2) + "\n")
    text = table(results, about, seconds, busy)
    print(text)
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.S)
    readme.write_text(new)
    shutil.copyfile(DEMO / "overview.png", ROOT / "docs" / "images" / "demo.png")


if __name__ == "__main__":
    main()
