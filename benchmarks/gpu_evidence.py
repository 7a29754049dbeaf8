"""Digits and Fashion-MNIST with networks of 32 million parameters on one GPU, in less than nine minutes.

    python benchmarks/gpu_evidence.py                        # where there is a CUDA device; goes on where it stopped
    python benchmarks/gpu_evidence.py --seconds 200          # begins no row that would end later
    python benchmarks/gpu_evidence.py --device cpu --tiny    # tries every row with a few steps
    python benchmarks/gpu_evidence.py --table                # the page's block from the record; runs nothing

A teacher by flow matching, a FACM student of it, and the same student without its anchor (the corner of the map that
breaks on a small network), each for so many seconds of training; then Frechet distances at 1, 2, 4 and 8 calls. The
record is written after each row. What is not installed is taken from the wheels in `.whl/`, as `gpu_check.py` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from gpu.wheels import unpack  # noqa: E402 - after the path

unpack(ROOT / ".whl")  # before anything is imported that may be among them

import torch  # noqa: E402 - after the wheels

from flowanchor import compose  # noqa: E402
from flowanchor.base.typed import instantiate  # noqa: E402
from flowanchor.errors import FlowAnchorError  # noqa: E402
from harness import RESULTS, markdown, refresh  # noqa: E402
from short_runs import STUDENTS, TEACHERS, Judge, Record, finite, fit, quiet  # noqa: E402

RECORD = RESULTS / "evidence_gpu.json"
PAGE, NAME = ROOT / "docs" / "results" / "stability.md", "larger networks"
COMMAND = "python benchmarks/gpu_evidence.py"
CALLS = (1, 2, 4, 8)
SIZE = ("backbone.depth=12", "backbone.hidden_size=384", "backbone.num_heads=6")
TINY = ("backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2")
PARTS = {"teacher": 60, "FACM": 60, "FACM without anchor": 40}  # seconds of training
AROUND = 25  # seconds for what a row does beside training


def words(data: str, part: str, folder: Path, device: str, tiny: bool) -> list[str]:
    """What is typed for a row."""
    cuda = device == "cuda"
    typed = [
        *(TINY if tiny else SIZE), f"data.batch_size={16 if tiny else 256}",
        f"trainer.accelerator={'gpu' if cuda else 'cpu'}", "trainer.devices=1",
        f"trainer.precision={'bf16-mixed' if cuda else '32-true'}", f"trainer.max_steps={3 if tiny else 1_000_000}",
    ]  # fmt: skip
    if not tiny:
        typed.append(f"+trainer.max_time={{seconds: {PARTS[part]}}}")
    if part == "teacher":
        return [f"experiment={TEACHERS[data]}", *typed]
    taught = [f"experiment={STUDENTS[data]}", f"teacher.checkpoint={folder.parent / 'teacher'}"]
    return [*taught, *typed, *(["objective/anchor=none"] if part == "FACM without anchor" else [])]


def measure(data: str, part: str, folder: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Train a row, and draw by it."""
    begun = time.perf_counter()
    done = fit(folder, *words(data, part, folder, device, tiny))
    spent, steps = time.perf_counter() - begun, len(done.watch.seconds)
    judge = Judge(instantiate(compose(f"data={data}").data), 40 if tiny else 1000)
    student, interval = (done.student, done.interval)
    if student is None:
        return {"steps": steps, "seconds": spent, "broke": True, "fd": {}}
    student.to(device)
    flow = instantiate(compose("sampler=flow").sampler, _convert_="all")
    fd = {}
    for calls in (2,) if tiny else CALLS:
        sampler = flow.with_nfe(calls) if part == "teacher" else done.sampler
        fd[str(calls)] = judge.distance(student, interval, sampler, calls)
    return {
        "parameters": sum(p.numel() for p in student.parameters()), "steps": steps, "seconds": spent, "broke": False,
        "highest_norm": max(done.watch.norms, default=None), "fd": fd,
    }  # fmt: skip


def page(content: Mapping[str, Any] | None) -> str:
    """The block of the page."""
    if content is None:
        return f"Networks of 32 million parameters on a GPU (`{COMMAND}`): not measured."
    lines = [
        [row["data"], row["part"], f"{row.get('parameters', 0) / 1e6:.1f}", row["steps"], f"{row['seconds']:.0f}",
         *("broke" if row["broke"] else f"{row['fd'][str(n)]:.2f}" if row["fd"].get(str(n)) is not None else "-"
           for n in CALLS)]
        for row in content["rows"]
    ]  # fmt: skip
    about, header = (
        content["machine"],
        ("data", "network", "M parameters", "steps", "s", *(f"{n} calls" for n in CALLS)),
    )
    told = (
        "Frechet distance of 1,000 balanced samples, one seed; the teacher by midpoint steps. Measured by "
        f"`{COMMAND}` on {content['about']['device']}, torch {about['torch']}, {about['date']}, commit "
        f"{about['commit']}."
    )
    return f"{markdown(header, lines)}\n\n{told}"


def present(data: str) -> bool:
    """Whether its files are here."""
    try:
        instantiate(compose(f"data={data}").data).setup("fit")
    except (FlowAnchorError, OSError):
        return False
    return True


def run(record: Record, folder: Path, device: str, tiny: bool, seconds: float) -> None:
    """The rows that are lacking, in order, as far as the time goes."""
    begun = time.monotonic()
    for data in TEACHERS:
        if not present(data):
            print(f"{data}: no files here, left out", flush=True)
            continue
        for part, needs in PARTS.items():
            if record.find(data=data, part=part) is not None:
                continue
            if time.monotonic() - begun + (0 if tiny else needs + AROUND) > seconds:
                print("The time is spent: the same command goes on.", flush=True)
                return
            found = measure(data, part, folder / data / part.replace(" ", "_"), device, tiny)
            record.add(finite({"data": data, "part": part, **found}))
            print(f"{data}, {part}: {found['fd']}, {found['steps']} steps in {found['seconds']:.0f} s", flush=True)


def main(typed: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Larger networks on one GPU, end to end.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny network; refreshes nothing")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "gpu_evidence")
    parser.add_argument("--table", action="store_true", help="the page's block from the record; run nothing")
    chosen = parser.parse_args(typed)
    if not chosen.table:
        if chosen.device == "cuda" and not torch.cuda.is_available():
            sys.exit("No CUDA device is here: --device cpu --tiny tries the rows.")
        if chosen.device == "cpu" and not chosen.tiny:
            sys.exit("On a CPU these networks take hours: add --tiny.")
        quiet()
        folder = chosen.folder.absolute() / ("tiny" if chosen.tiny else "whole")
        device = torch.cuda.get_device_name() if chosen.device == "cuda" else "a CPU"
        about = {"device": device, "size": list(TINY if chosen.tiny else SIZE), "seconds": PARTS}
        record = Record(folder / "tiny.json" if chosen.tiny else RECORD, about, chosen.tiny)
        run(record, folder, chosen.device, chosen.tiny, chosen.seconds)
        if chosen.tiny:
            print(page(record.content))
            return
    content = json.loads(RECORD.read_text()) if RECORD.is_file() else None
    refresh(PAGE, NAME, page(content))


if __name__ == "__main__":
    main()
