"""How cost and quality grow: a step with depth, width, tokens and batch; distances with parameters, steps and batch.

    python benchmarks/growth.py                  # both; goes on where it stopped; about forty CPU minutes
    python benchmarks/growth.py --part cost      # one of them
    python benchmarks/growth.py --quick          # the smallest of each; writes no page
    python benchmarks/growth.py --table          # the page from the record; runs nothing

Cost: CPU seconds (median of three steps, one thread) and counted bytes of a FACM step with a guided teacher. Quality:
small networks on digits, a teacher of each size, students distilled from it. Slopes are of straight lines through the
logarithms: 1 is proportional, 2 quadratic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import RESULTS, ROOT, markdown, refresh
from short_runs import Judge, Record, fit, measured_by, quiet, spread

sys.path.insert(0, str(ROOT / "src"))

from counting import LiveBytes
from facm import facm_step
from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.checkpoints import load_model

PAGE = ROOT / "docs" / "results" / "growth.md"
RECORD = RESULTS / "growth.json"
SEEDS = (0, 1, 2)
ROUNDS = 3
# One thing at a time is changed from these.
BASE = {"depth": 4, "hidden_size": 128, "tokens": 256, "batch": 4}
COSTS = {"depth": (2, 4, 8, 16), "hidden_size": (64, 128, 256, 384), "tokens": (64, 256, 1024), "batch": (2, 4, 8, 16)}
# Many tokens: one narrow block and one sample, whose step fits in a gigabyte at 16,384.
LONG = {"depth": 1, "hidden_size": 64, "batch": 1}
LONG_TOKENS = (64, 256, 1024, 4096, 16384)
HEAD = 32  # channels of an attention head
WIDTH, STEPS, BATCH, TEACHER_STEPS = 48, 100, 32, 1000  # of the networks whose samples are looked at
QUALITIES = {"hidden_size": (16, 32, 48, 64), "steps": (25, 50, 100, 200), "batch": (8, 32, 128)}
SAMPLES, SETS = 500, 2


def cost(depth: int, hidden_size: int, tokens: int, batch: int) -> dict[str, float]:
    """CPU seconds and bytes of a step."""
    torch.set_num_threads(1)
    side = round(tokens**0.5)
    size = {"depth": depth, "hidden_size": hidden_size, "num_heads": hidden_size // HEAD, "input_size": side}
    work = facm_step("Chain(recompute)", batch, **size)
    taken = []
    for number in range(ROUNDS + 1):
        work.forget()
        begun = time.process_time()
        work.step()
        if number:  # the first one warms up
            taken.append(time.process_time() - begun)
    work.forget()
    with LiveBytes() as counter:
        work.step()
    return {"cpu_seconds": statistics.median(taken), "bytes": counter.peak}


def measure_costs(record: Record, quick: bool) -> None:
    for what, values in COSTS.items():
        for value in values[:2] if quick else values:
            if record.find(part="cost", what=what, value=value) is None:
                record.add({"part": "cost", "what": what, "value": value, **cost(**{**BASE, what: value})})
                print("cost", what, value, flush=True)
    for tokens in LONG_TOKENS[:2] if quick else LONG_TOKENS:
        if record.find(part="long", value=tokens) is None:
            record.add({"part": "long", "what": "tokens", "value": tokens, **cost(**LONG, tokens=tokens)})
            print("long", tokens, flush=True)


def measure_quality(record: Record, folder: Path, quick: bool) -> None:
    judge = Judge(instantiate(compose("data=digits").data), SAMPLES)
    flow = instantiate(compose("sampler=flow", "sampler.solver=midpoint").sampler, _convert_="all")
    for what, values in QUALITIES.items():
        for value in values[:1] if quick else values:
            case = settings({"what": what, "value": value})
            teacher = folder / f"teacher_{case['hidden_size']}"
            size = ("backbone.depth=2", f"backbone.hidden_size={case['hidden_size']}")
            if not (teacher / "checkpoints" / "last.ckpt").is_file():
                steps = 3 if quick else TEACHER_STEPS
                fit(teacher, "experiment=digits_teacher", *size, f"trainer.max_steps={steps}")
            for seed in SEEDS[:1] if quick else SEEDS:
                if seed in students(record.content["rows"], case):
                    continue
                model = load_model(teacher)
                done = fit(
                    folder, "experiment=digits_facm", *size, f"teacher.checkpoint={teacher}", f"seed={seed}",
                    f"trainer.max_steps={3 if quick else case['steps']}", f"data.batch_size={case['batch']}",
                    ends=False,
                )  # fmt: skip
                assert done.student is not None
                record.add({
                    "part": "quality", "what": what, "value": value, "seed": seed,
                    "parameters": sum(parameter.numel() for parameter in done.student.parameters()),
                    "teacher": judge.distance(model.backbone, model.interval, flow, 16),
                    "student": judge.mean(done.student, done.interval, done.sampler, 2, SETS),
                })  # fmt: skip
                print("quality", what, value, seed, flush=True)


def settings(row: Mapping[str, Any]) -> dict[str, int]:
    """Of the student of a row: one of them is the series' own. Series cross where none differs from its usual value."""
    return {"hidden_size": WIDTH, "steps": STEPS, "batch": BATCH, row["what"]: row["value"]}


def students(rows: Sequence[Mapping[str, Any]], case: Mapping[str, int]) -> dict[int, Mapping[str, Any]]:
    """By seed, the rows of these settings, whichever series measured them."""
    return {row["seed"]: row for row in rows if row["part"] == "quality" and settings(row) == case}


def slope(values: Sequence[float], found: Sequence[float]) -> float:
    """Of the straight line through the logarithms."""
    return float(np.polyfit(np.log(values), np.log(found), 1)[0])


def off(values: Sequence[float], found: Sequence[float]) -> float:
    """The largest factor by which what was found lies above or below that line; 1 where all lie on it."""
    x, y = np.log(values), np.log(found)
    return float(np.exp(np.abs(y - np.polyval(np.polyfit(x, y, 1), x)).max()))


def cost_row(what: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Values, seconds and bytes, each with its slope and how far they are off."""
    values = [row["value"] for row in rows]
    seconds, held = [row["cpu_seconds"] for row in rows], [row["bytes"] for row in rows]
    slopes = [f"{slope(values, found):.2f} (x{off(values, found):.2f})" for found in (seconds, held)]
    return [
        what, ", ".join(f"{value:,}" for value in values), ", ".join(f"{one:.2f}" for one in seconds), slopes[0],
        ", ".join(f"{one / 1e6:.0f}" for one in held), slopes[1],
    ]  # fmt: skip


def steps_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The slope from each value to the next, of seconds and bytes: where a line bends."""
    pairs = list(itertools.pairwise(rows))
    text = []
    for key in ("cpu_seconds", "bytes"):
        found = (slope([a["value"], b["value"]], [a[key], b[key]]) for a, b in pairs)
        text.append(", ".join(f"{one:.2f}" for one in found))
    return f"From each number of tokens to the next the slopes are {text[0]} in seconds and {text[1]} in bytes."


def described(size: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in size.items())


def page(content: Mapping[str, Any]) -> str:
    about = content["about"]
    rows = sorted(content["rows"], key=lambda row: row["value"])
    lines = [cost_row(what, [r for r in rows if r["part"] == "cost" and r["what"] == what]) for what in COSTS]
    header = ("what grows", "values", "CPU seconds of a step", "slope", "peak MB of a step", "slope")
    text = [
        markdown(header, lines),
        f"A FACM step with a guided teacher, Chain(recompute), float32; where nothing else is said {described(BASE)}; "
        f"median of {ROUNDS} steps. In brackets the largest factor by which a value is off the straight line.",
    ]
    long = [row for row in rows if row["part"] == "long"]
    if len(long) > 1:
        text += [markdown(header, [cost_row("tokens", long)]), f"The same of {described(LONG)}. {steps_of(long)}"]
    quality = []
    for what, values in QUALITIES.items():
        for value in values:
            found = list(students(rows, settings({"what": what, "value": value})).values())
            if found:
                student = spread([row["student"] for row in found])
                parameters, teacher = f"{found[0]['parameters']:,}", f"{found[0]['teacher']:.2f}"
                quality.append([what, f"{value}", parameters, teacher, student])
    if quality:
        text += [
            markdown(("what grows", "value", "parameters", "FD of the teacher", "FD of students, two steps"), quality),
            f"FD-digits of {SAMPLES} images ({SETS} sets for students), mean ± standard deviation over {len(SEEDS)} "
            f"seeds; the teacher in 16 calls (midpoint), after {TEACHER_STEPS:,} steps; students of {STEPS} steps of "
            f"{BATCH} and width {WIDTH} where nothing else is said.",
        ]
    assert about["rounds"] == ROUNDS
    return "\n\n".join([*text, f"Measured by {measured_by(content, 'python benchmarks/growth.py')}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="How cost and quality grow.")
    parser.add_argument("--part", choices=("cost", "quality"), help="one of them")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "growth")
    parser.add_argument("--table", action="store_true", help="the page from the record; run nothing")
    parser.add_argument("--quick", action="store_true", help="the smallest of each; refreshes nothing")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.table:
        refresh(PAGE, "growth", page(json.loads(RECORD.read_text())))
        return
    quiet()
    if arguments.quick:
        folder = folder.with_name(f"{folder.name}_quick")
    about = {
        "rounds": ROUNDS,
        "base": BASE,
        "long": LONG,
        "seeds": list(SEEDS),
        "steps": STEPS,
        "teacher_steps": TEACHER_STEPS,
    }
    record = Record(folder / "quick.json" if arguments.quick else RECORD, about, arguments.quick)
    if arguments.part != "quality":
        measure_costs(record, arguments.quick)
    if arguments.part != "cost":
        measure_quality(record, folder, arguments.quick)
    print(page(record.content))
    if not arguments.quick:
        refresh(PAGE, "growth", page(record.content))


if __name__ == "__main__":
    main()
