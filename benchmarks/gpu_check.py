"""`make gpu-check`: what needs a GPU, measured and tested on the one that is here, in less than nine minutes.

    python benchmarks/gpu_check.py                                       # where there is a CUDA device
    python benchmarks/gpu_check.py --seconds 200 --only card digits XL/1 # rows whose names begin so
    python benchmarks/gpu_check.py --device cpu --tiny --results FOLDER  # tries every row; the figures mean nothing
    python benchmarks/gpu_check.py --table [FILE]                        # takes a record home, and refreshes the docs

It needs PyTorch, Triton and Lightning, and nothing of a network: what else is missing is taken from the wheels in
`.whl/` (benchmarks/gpu/wheels.py says which). Training steps are those of `train.py`. Rows run in one process after the
other, in order of value; the record (benchmarks/results/gpu_NAME.json) is written after each. A row that fails says
why; one that ends its process, or takes too long, costs only itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from gpu.wheels import unpack  # noqa: E402 - after the path

WHEELS = unpack(ROOT / ".whl")  # before anything is imported that may be among them; what went wrong, if anything
LACKING = [name for name in ("torch", "lightning", "einops", "safetensors") if find_spec(name) is None]
if LACKING:
    lost = "" if WHEELS is None else f" ({WHEELS})"
    sys.exit(
        f"Not installed here, and not among the wheels in .whl/{lost}: {', '.join(LACKING)}. docs/performance.md, 'On "
        "a machine without a network', says what to bring."
    )

import torch  # noqa: E402 - after the wheels

from gpu import attention, card, checks, table, training  # noqa: E402
from gpu.record import LATE, UNFINISHED, Record, Row  # noqa: E402
from harness import RESULTS, machine, refresh, write_json  # noqa: E402

SECONDS = {"cuda": 420.0, "cpu": 3600.0}  # after which no row is begun
AFTER = 60.0  # seconds that a row may take beyond that
PATIENCE = {"cuda": 1, "cpu": 10}  # a row's limit is meant for a card of its own, not for a CPU that others use as well
BROKEN = 3  # exit code of a worker whose device answers no more


def rows(device: str, tiny: bool) -> list[Row]:
    """All of them, in order of value."""
    return [
        *card.rows(device, tiny),
        *training.rows(tiny),
        *checks.rows(device, tiny)[:1],
        *attention.rows(device, tiny),
        *training.more_rows(tiny)[:3],
        *training.spread_rows(tiny),
        *checks.rows(device, tiny)[1:],
        *training.wan_rows(tiny)[:4],
        *training.more_rows(tiny)[3:],
        *training.wan_rows(tiny)[4:],
    ]


def chosen_rows(chosen: argparse.Namespace) -> list[Row]:
    every = rows(chosen.device, chosen.tiny)
    return [row for row in every if not chosen.only or row.name.startswith(tuple(chosen.only))]


# -------------------------------------------------------------------------------------------------------- the two parts


def work(chosen: argparse.Namespace) -> int:
    """The rows that are not in the record yet, one after the other."""
    warnings.simplefilter("ignore")
    record = Record(chosen.record)
    for row in chosen_rows(chosen):
        if not record.run(row, chosen.ends) and chosen.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # a fault of the device stays with the process
                return BROKEN
    return 0


def supervise(chosen: argparse.Namespace, path: Path) -> None:
    """Start workers until every row is in the record; end one that is stuck in a row."""
    ends = time.time() + chosen.seconds
    todo = {row.name: row for row in chosen_rows(chosen)}
    command = [sys.executable, str(Path(__file__)), "--work", "--record", str(path), "--ends", str(ends)]
    command += ["--device", chosen.device, *(["--tiny"] if chosen.tiny else [])]
    command += ["--only", *chosen.only] if chosen.only else []
    while set(todo) - set(Record(path).rows):
        before = len(Record(path).rows)
        worker = subprocess.Popen(command, start_new_session=True)
        try:
            _watch(worker, path, todo, ends + AFTER, PATIENCE[chosen.device])
        finally:
            _end(worker)
        record = Record(path)
        late = time.time() > ends + AFTER
        if late or len(record.rows) == before:
            why = LATE if late else f"no worker could begin it (exit code {worker.returncode})"
            record.rows.update({name: {"missing": why} for name in todo if name not in record.rows})
            record.write()


def _end(worker: subprocess.Popen[bytes]) -> None:
    """It, and what it has started: tests that go on would share the device with the next rows."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:  # all of them have ended
        pass
    worker.wait()


def _watch(worker: subprocess.Popen[bytes], path: Path, todo: dict[str, Row], latest: float, patience: int) -> None:
    current, since = "", time.time()
    while worker.poll() is None:
        time.sleep(0.2)
        found = Record(path).rows
        now = next((name for name in reversed(found) if found[name].get("missing") == UNFINISHED), "")
        if now != current:
            current, since = now, time.time()
        limit = patience * (todo[current].limit if current in todo else 120.0)
        if time.time() > min(since + limit, latest):
            return


# -------------------------------------------------------------------------------------------------------------- records


def recorded() -> dict[str, Any] | None:
    """What was measured last on a GPU."""
    records = [json.loads(path.read_text()) for path in RESULTS.glob("gpu_*.json")]
    return max(records, key=lambda record: record["machine"]["date"], default=None)


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def take_home(path: Path) -> None:
    """Put a record from elsewhere among the results; raises `SystemExit` where it is none of a GPU."""
    found = json.loads(path.read_text())
    about = found.get("machine", {})
    if not found.get("rows") or not about.get("gpu"):
        sys.exit(f"{path} is no record of a GPU: give the file that make gpu-check wrote there.")
    write_json(RESULTS / f"gpu_{slug(about['device'])}.json", found)


def show() -> None:
    for page in ("README.md", "docs/performance.md"):
        refresh(ROOT / page, "gpu table", table.table(recorded()))
    refresh(ROOT / "docs" / "compatibility.md", "gpu runs", table.runs(recorded()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure and test what needs a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this program")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds; the figures mean nothing")
    parser.add_argument("--seconds", type=float, help="after which no row is begun (420, and on a CPU 3600)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows whose names begin so")
    parser.add_argument("--results", type=Path, help="write the record into this folder, and leave the docs alone")
    parser.add_argument("--table", nargs="?", const=True, metavar="FILE", help="refresh the docs; measure nothing")
    for hidden, kind in (("--record", Path), ("--ends", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        sys.exit(work(chosen))
    if chosen.table:
        if chosen.table is not True:
            take_home(Path(chosen.table))
        show()
        return
    chosen.seconds = SECONDS[chosen.device] if chosen.seconds is None else chosen.seconds
    if chosen.device == "cpu" and chosen.results is None:
        sys.exit("A trial on the CPU must not pass for figures of a GPU: add --results FOLDER.")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("This machine has no CUDA device that PyTorch sees: run make gpu-check on one that has.")
    gpu = chosen.device == "cuda"
    name = torch.cuda.get_device_name() if gpu else "cpu (a trial, no GPU)"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    path = (chosen.results or RESULTS) / f"{'gpu_' if gpu else ''}{slug(name)}.json"
    if not chosen.only:
        path.unlink(missing_ok=True)
    record = Record(path)
    for row in chosen_rows(chosen):  # measured anew; what else an earlier call measured stays
        record.rows.pop(row.name, None)
    record.content["machine"] = {**machine(), "device": name, "gpu": gpu, "tiny": chosen.tiny}
    if WHEELS is not None:
        record.content["machine"]["wheels"] = WHEELS
    record.write()
    supervise(chosen, path)
    print(table.table(Record(path).content))
    if chosen.results is None and not chosen.tiny:
        show()


if __name__ == "__main__":
    main()
