"""Does a student forget the velocity that its shortcut is built on, and does an anchor keep it? On digits.

    python benchmarks/forgetting.py                 # goes on where it stopped; about 15 CPU minutes
    python benchmarks/forgetting.py --quick         # two rows, a few steps: shows that it runs, writes no page
    python benchmarks/forgetting.py --table         # page and figure from the record; runs nothing

Every row distils the teacher that comes with the package, from its weights, for the same number of steps. As it trains,
the answer to the anchor's question is held against the data's and the teacher's velocity on held-out samples
(callbacks=forgetting). At the end the averaged student is drawn from in one and two steps, and along its own flow. What
comes out is written into docs/results/forgetting.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness import RESULTS, ROOT, markdown, refresh
from pictures import FOLDER, keep
from short_runs import Judge, Record, finite, fit, measured_by, quiet, spread

sys.path.insert(0, str(ROOT / "src"))

from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.callbacks.forgetting import Forgetting
from flowanchor.checkpoints import load_model
from flowanchor.interfaces import Sampler
from flowanchor.jumps.guidance import Guidance
from flowanchor.metrics.flow_error import TIMES, Probe, teacher_network

RECORD = RESULTS / "forgetting.json"
PAGE = ROOT / "docs" / "results" / "forgetting.md"
SEEDS = (0, 1, 2)
TEACHER = ROOT / "src" / "flowanchor" / "shipped" / "digits_teacher"  # of the recipe experiment=digits_teacher
STEPS, BATCH, EVERY = 100, 32, 25
FLOW_CALLS = 16  # midpoint steps: where more of them change nothing (docs/samplers.md)
HELD_OUT = 100  # whose velocities are asked for
SAMPLES, SETS = 500, 2  # of each score; along the flow one set


@dataclass(frozen=True)
class Row:
    """An objective, and whether one of its terms trains the flow branch."""

    name: str
    words: tuple[str, ...]
    anchored: str  # by what


R_EMBEDDER = ("backbone.auxiliary_time_cond=true",)
# Beside a student that starts as its teacher the adaptive weight holds it there (docs/results/ablation.md).
UNWEIGHTED = "objective.shortcut.weight_power=0.0"
ROWS = (
    Row("FACM", ("objective=facm",), "anchor on 2 - t"),
    Row("FACM without anchor", ("objective=facm", "objective/anchor=none"), "nothing"),
    Row("FACM, plain interval", ("objective=facm", "objective/interval=plain"), "anchor on the shortcut's t"),
    Row("FACM, auxiliary interval", ("objective=facm", "objective/interval=auxiliary", *R_EMBEDDER), "anchor on r = t"),
    Row("MeanFlow", ("objective=meanflow", UNWEIGHTED, *R_EMBEDDER), "3/4 of the batch"),
    Row(
        "MeanFlow without r = t",
        ("objective=meanflow", "objective.shortcut.share=0.0", UNWEIGHTED, *R_EMBEDDER),
        "nothing",
    ),
    Row("sCM", ("objective=scm", f"objective.shortcut.warmup_steps={STEPS // 4}"), "nothing; one time"),
    Row("DMF", ("objective=dmf",), "half of the batch"),
    Row(
        "MeanFlow, gated",
        ("objective=meanflow", "objective/interval=gated", "objective.shortcut.share=0.5", UNWEIGHTED),
        "half of the batch",
    ),
)


def measure(
    row: Row, seed: int, teacher: Path, judge: Judge, flow: Sampler, folder: Path, steps: int, every: int
) -> dict[str, Any]:
    """Train one row with one seed, and look at it."""
    forgetting = Forgetting(every_n_steps=every, samples=HELD_OUT)
    done = fit(
        folder, "experiment=digits_facm", *row.words, f"teacher.checkpoint={teacher}", f"seed={seed}",
        f"trainer.max_steps={steps}", f"data.batch_size={BATCH}", forgetting=forgetting, ends=False,
    )  # fmt: skip
    curves = [{"step": step, "lines": [line.as_dict() for line in found]} for step, found in forgetting.history]
    found: dict[str, Any] = {"row": row.name, "seed": seed, "broke": done.student is None, "curves": curves, "fd": {}}
    if done.student is not None:
        for nfe in (1, 2):
            found["fd"][str(nfe)] = judge.mean(done.student, done.interval, done.sampler, nfe, SETS)
        found["fd"]["flow"] = judge.distance(done.student, done.interval, flow, FLOW_CALLS)
    return found


def of_teacher(teacher: Path, judge: Judge, flow: Sampler) -> dict[str, Any]:
    """What the students began as: its own error, and its distances along the flow."""
    model = load_model(teacher)
    probe = Probe.of(judge.data.val_dataloader(), HELD_OUT)
    own = probe.measure(model.backbone, model.interval, TIMES, teacher_network(model.backbone, None, Guidance()))
    fd = {str(n): judge.distance(model.backbone, model.interval, flow, n) for n in (2, FLOW_CALLS)}
    floor = judge.evaluator.floor(SAMPLES)
    return {"lines": [line.as_dict() for line in own], "fd": fd, "floor": floor.fd, "step": model.step}


# --------------------------------------------------------------------------------------------------------- the page


def mean_of(lines: Sequence[Mapping[str, float]], name: str) -> float:
    """Over the times."""
    return statistics.fmean(line[name] for line in lines)


def table(content: Mapping[str, Any]) -> str:
    """A line per objective: means and spread over the seeds."""
    before = mean_of(content["teacher"]["lines"], "error")
    header = (
        "objective", "what trains the velocity", "error, percent more than the teacher's", "distance from the teacher",
        "cosine with the teacher", "worst time, its cosine", "FD, 1 step", "FD, 2 steps",
        f"FD, {FLOW_CALLS} calls along the flow",
    )  # fmt: skip
    lines = []
    for row in ROWS:
        runs = [run for run in content["rows"] if run["row"] == row.name]
        if not runs:
            continue
        ends = [run["curves"][-1]["lines"] for run in runs if not run["broke"]]
        worst = [min(end, key=lambda line: line["cosine"]) for end in ends]
        times = "/".join(dict.fromkeys(f"{line['t']:g}" for line in worst))
        lines.append([
            row.name, row.anchored,
            spread([100 * (mean_of(end, "error") / before - 1) for end in ends], 1),
            spread([mean_of(end, "from_teacher") for end in ends], 4),
            spread([mean_of(end, "cosine") for end in ends], 4),
            f"{times}: {spread([line['cosine'] for line in worst], 3)}" if worst else "-",
            *(spread([run["fd"].get(key) for run in runs]) for key in ("1", "2", "flow")),
        ])  # fmt: skip
    fd = content["teacher"]["fd"]
    lines.append(["teacher", "", "0", "0", "1", "", "", f"{fd['2']:.2f}", f"{fd[str(FLOW_CALLS)]:.2f}"])
    return markdown(header, lines)


def page(content: Mapping[str, Any]) -> str:
    """The table, and how to read it."""
    about, teacher = content["about"], content["teacher"]
    broke = sum(run["broke"] for run in content["rows"])
    times = ", ".join(f"{line['t']:g}" for line in teacher["lines"])
    return "\n\n".join(
        [
            table(content),
            f"Mean ± standard deviation over {len(about['seeds'])} seeds after {about['steps']} steps of "
            f"{about['batch']}; {broke} of {len(content['rows'])} runs stopped on values that are not finite. "
            f"Velocities: mean over t = {times}, of {about['held_out']} held-out images with fixed noise; the "
            f"teacher's own error is {mean_of(teacher['lines'], 'error'):.4f}, most of it the variance of the data's "
            f"velocity given `x_t`. FD-digits of {about['samples']} images ({about['sets']} sets; along the flow one), "
            f"the teacher by midpoint steps; floor (held-out images) {teacher['floor']:.2f}. "
            + measured_by(content, "python benchmarks/forgetting.py"),
        ]
    )


def figure(content: Mapping[str, Any]) -> Figure:
    """The distance from the teacher's velocity over training, and where in time it lies at the end."""
    drawn = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(drawn)
    over, where = drawn.subplots(1, 2)
    names = [row.name for row in ROWS if any(run["row"] == row.name for run in content["rows"])]
    for number, name in enumerate(names):
        colour, dashes = (
            f"C{number}",
            "--" if next(r for r in ROWS if r.name == name).anchored.startswith("nothing") else "-",
        )
        runs = [run for run in content["rows"] if run["row"] == name and run["curves"]]
        for index, run in enumerate(runs):
            points = [(p["step"], mean_of(p["lines"], "from_teacher")) for p in run["curves"] if p["step"]]
            over.plot(*zip(*points, strict=True), dashes, color=colour, linewidth=1.1, label=None if index else name)
            end = run["curves"][-1]["lines"]
            where.plot(
                [line["t"] for line in end], [line["cosine"] for line in end], dashes, color=colour, linewidth=1.1
            )
    over.set_yscale("log")
    over.set_xlabel("training step")
    over.set_title("mean square distance from the teacher's velocity", fontsize=10)
    where.set_xlabel("time (0: noise, 1: data)")
    where.set_title("cosine with the teacher's velocity, at the end", fontsize=10)
    drawn.legend(loc="outside lower center", fontsize=8, ncols=5)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what students forget of the flow.")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "forgetting")
    parser.add_argument("--table", action="store_true", help="page and figure from the record; run nothing")
    parser.add_argument("--quick", action="store_true", help="two rows, a few steps; refreshes nothing")
    arguments = parser.parse_args()
    if arguments.table:
        show(json.loads(RECORD.read_text()))
        return
    quiet()
    steps, every, rows, seeds = (4, 2, ROWS[:2], (0,)) if arguments.quick else (STEPS, EVERY, ROWS, SEEDS)
    folder = arguments.folder.absolute()
    about = {
        "steps": steps,
        "batch": BATCH,
        "held_out": HELD_OUT,
        "samples": SAMPLES,
        "sets": SETS,
        "seeds": list(seeds),
    }
    record = Record(folder / "quick.json" if arguments.quick else RECORD, about, arguments.quick)
    teacher = TEACHER
    judge = Judge(instantiate(compose("data=digits").data), SAMPLES)
    flow = instantiate(compose("sampler=flow", "sampler.solver=midpoint").sampler, _convert_="all")
    if "teacher" not in record.content:
        record.content["teacher"] = finite(of_teacher(teacher, judge, flow))
        record.save()
    for seed in seeds:
        for row in rows:
            if record.find(row=row.name, seed=seed) is None:
                found = measure(row, seed, teacher.absolute(), judge, flow, folder, steps, every)
                record.add(found)
                print(f"{row.name}, seed {seed}: {found['fd'] or 'stopped'}", flush=True)
    if arguments.quick:
        print(page(record.content))
    else:
        show(record.content)


def show(content: Mapping[str, Any]) -> None:
    text = page(content)
    print(text)
    keep(figure(content), FOLDER / "forgetting.png")
    refresh(PAGE, "forgetting table", text)


if __name__ == "__main__":
    main()
