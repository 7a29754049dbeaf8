"""Where consistency training stays stable: scale of the time embedding, precision, start, anchor, normalised tangents.

    python benchmarks/stability.py                            # digits; goes on where it stopped
    python benchmarks/stability.py --data fashion_mnist       # fewer cells; needs the files of data=fashion_mnist
    python benchmarks/stability.py --budget 20                # begins no run after 20 CPU minutes
    python benchmarks/stability.py --cells 0 3                # these cells only, counted from 0
    python benchmarks/stability.py --quick                    # two cells, a few steps; writes no page
    python benchmarks/stability.py --table                    # page and picture from the records; runs nothing

The shortcut is sCM's without warm-up, its barest form: no clamp, no relaxation. All of anchor x scale x precision is
measured for distilled students with raw tangents; the other factors are changed at float32 alone. FACM's own shortcut,
with its clamp and its relaxation, stands beside it. Three seeds of a cell before the next one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness import RESULTS, ROOT, markdown, refresh
from pictures import FOLDER, keep
from short_runs import TEACHERS, Judge, Record, finite, fit, measured_by, quiet, spread

sys.path.insert(0, str(ROOT / "src"))

from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.checkpoints import load_model
from flowanchor.interfaces import Backbone, Interval

PAGE = ROOT / "docs" / "results" / "stability.md"
SEEDS = (0, 1, 2)
SAMPLES, SETS = 500, 2
SIZE = ("backbone.depth=2", "backbone.hidden_size=48")
OWN = {"digits": (), "fashion_mnist": ("backbone.patch_size=4",)}
STEPS = {"digits": 200, "fashion_mnist": 100}
TEACHER_STEPS = {"digits": 2000, "fashion_mnist": 600}
BATCH = 32
# Those of the recipes of distillation, for students from scratch as well.
RECIPE = (
    "optimizer.lr=5e-4", "optimizer.betas=[0.9,0.99]", "ema.sigma_rel=[0.1,0.05]",
    "backbone.disable_label_dropout=true",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One place of the map."""

    anchor: bool
    scale: int  # backbone.time_scale
    precision: str = "32-true"  # trainer.precision
    start: str = "distilled"  # from its teacher's weights, or from scratch
    tangent: str = "raw"  # or normalised, or facm: FACM's own shortcut

    def words(self, teacher: Path | None) -> tuple[str, ...]:
        """What is typed for it."""
        if self.tangent == "facm":
            form: tuple[str, ...] = ("objective=facm",) if self.anchor else ("objective=facm", "objective/anchor=none")
        else:
            normalisation = "0.1" if self.tangent == "normalised" else "null"
            anchor = ("objective/anchor=flow_matching",) if self.anchor else ()
            form = (
                "objective=scm", "objective/interval=expanded", *anchor, "objective.shortcut.warmup_steps=0",
                f"objective.shortcut.normalisation={normalisation}",
            )  # fmt: skip
        taught = () if teacher is None else (
            "teacher=checkpoint", f"teacher.checkpoint={teacher}", "teacher.guidance_scale=1.0",
            f"initialise_from={teacher}",
        )  # fmt: skip
        return (*form, *taught, f"backbone.time_scale={self.scale}.0", f"trainer.precision={self.precision}", *RECIPE)


def cells(data: str) -> list[Cell]:
    """The design, what matters most first."""
    both = (True, False)
    if data == "fashion_mnist":
        corners = [(1, "32-true"), (1000, "32-true"), (1000, "bf16-mixed")]
        raw = [Cell(anchor, scale, precision) for scale, precision in corners for anchor in both]
        return [*raw, *(Cell(anchor, 1, tangent="facm") for anchor in both)]
    first = [Cell(a, s) for s in (1, 1000, 100) for a in both] + [Cell(a, 1000, "bf16-mixed") for a in both]
    others = [
        Cell(a, s, start=start, tangent=tangent)
        for start, tangent in (("distilled", "normalised"), ("distilled", "facm"), ("scratch", "raw"))
        for s in (1, 1000)
        for a in both
    ]
    return [*first, *others, *(Cell(a, s, "bf16-mixed") for s in (1, 100) for a in both)]


@dataclass
class Study:
    """One data set: its teachers, its judge, its record."""

    data: str
    folder: Path
    record: Record
    steps: int
    teacher_steps: int
    begun: float
    budget: float  # CPU minutes

    def __post_init__(self) -> None:
        self.judge = Judge(instantiate(compose(f"data={self.data}").data), SAMPLES)
        self.sampler = instantiate(compose("sampler=consistency").sampler, _convert_="all")

    @property
    def over(self) -> bool:
        return time.process_time() - self.begun > 60 * self.budget

    def teacher(self, scale: int) -> Path:
        """A flow model of this scale, trained unless it is there."""
        folder = self.folder / f"teacher_{scale}"
        if not (folder / "checkpoints" / "last.ckpt").is_file():
            print(f"training the teacher of scale {scale}", flush=True)
            fit(
                folder, f"experiment={TEACHERS[self.data]}", *SIZE, f"backbone.time_scale={scale}.0",
                f"trainer.max_steps={self.teacher_steps}",
            )  # fmt: skip
        return folder

    def start(self, cell: Cell) -> float:
        """The two-step distance of what a cell begins with: its teacher, or a network of no training."""
        kept: dict[str, float] = self.record.content.setdefault("starts", {})
        key = f"{cell.start}, {cell.scale}"
        if key not in kept:
            network, interval = self._beginning(cell)
            kept[key] = finite(self.judge.mean(network, interval, self.sampler, 2, SETS))
            self.record.save()
        return kept[key]

    def _beginning(self, cell: Cell) -> tuple[Backbone, Interval]:
        if cell.start == "distilled":
            model = load_model(self.teacher(cell.scale))
            return model.backbone, model.interval
        cfg = compose(f"data={self.data}", *OWN[self.data], *SIZE, f"backbone.time_scale={cell.scale}.0")
        torch.manual_seed(0)
        return instantiate(cfg.backbone).eval(), instantiate(cfg.objective.interval)

    def measure(self, cell: Cell, seed: int) -> dict[str, Any]:
        """One run of a cell."""
        start = self.start(cell)
        teacher = self.teacher(cell.scale).absolute() if cell.start == "distilled" else None
        done = fit(
            self.folder, f"data={self.data}", *OWN[self.data], *SIZE, *cell.words(teacher), f"seed={seed}",
            f"trainer.max_steps={self.steps}", f"data.batch_size={BATCH}", ends=False,
        )  # fmt: skip
        fd = {
            str(n): None
            if done.student is None
            else self.judge.mean(done.student, done.interval, self.sampler, n, SETS)
            for n in (1, 2)
        }
        norms = done.watch.norms
        return finite({
            **asdict(cell), "seed": seed, "broke": done.student is None, "fd": fd, "began_at": start,
            "steps": len(done.watch.seconds), "highest_norm": max(norms, default=None),
            "median_norm": statistics.median(norms) if norms else None,
        })  # fmt: skip

    def all(self, wanted: Sequence[Cell], seeds: Sequence[int]) -> None:
        for cell in wanted:
            for seed in seeds:
                if self.record.find(**asdict(cell), seed=seed) is not None:
                    continue
                if self.over:
                    print("The budget is spent: the same command goes on.", flush=True)
                    return
                found = self.measure(cell, seed)
                self.record.add(found)
                print(
                    f"{cell}, seed {seed}: {found['fd']}, highest norm {found['highest_norm']}, "
                    f"{time.process_time() - self.begun:.0f} s",
                    flush=True,
                )


# --------------------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Found:
    """What the runs of a cell come to."""

    cell: Cell
    fd: list[float]  # at two steps, of runs that ended
    worse: int  # stopped on values that are not finite, or further from the data than where they began
    stopped: int
    runs: int
    highest: float | None  # norm of a gradient before it was clipped

    @property
    def text(self) -> str:
        return spread(self.fd)


def found(content: Mapping[str, Any], wanted: Sequence[Cell]) -> list[Found]:
    """The cells that were measured."""
    lines = []
    for cell in wanted:
        runs = [row for row in content["rows"] if all(row[key] == value for key, value in asdict(cell).items())]
        if not runs:
            continue
        fd = [row["fd"]["2"] for row in runs if row["fd"]["2"] is not None]
        worse = sum(row["fd"]["2"] is None or row["fd"]["2"] > row["began_at"] for row in runs)
        stopped = sum(row["broke"] for row in runs)
        norms = [row["highest_norm"] for row in runs if row["highest_norm"] is not None]
        lines.append(Found(cell, fd, worse, stopped, len(runs), max(norms, default=None)))
    return lines


def table(content: Mapping[str, Any], wanted: Sequence[Cell]) -> str:
    """A line per cell, with and without the anchor side by side."""
    known = {line.cell: line for line in found(content, wanted)}
    header = (
        "start", "tangent", "precision", "time scale", "began at", "FD with anchor", "FD without",
        "worse than it began, with", "without", "highest norm with", "without",
    )  # fmt: skip
    lines = []
    for cell in (cell for cell in wanted if cell.anchor):
        pair = [known.get(cell), known.get(Cell(**{**asdict(cell), "anchor": False}))]
        if any(pair):
            lines.append([
                cell.start, cell.tangent, cell.precision, f"x{cell.scale}",
                f"{content['starts'][f'{cell.start}, {cell.scale}']:.1f}",
                *("-" if one is None else one.text for one in pair),
                *("-" if one is None else f"{one.worse} of {one.runs}" for one in pair),
                *("-" if one is None or one.highest is None else f"{one.highest:.3g}" for one in pair),
            ])  # fmt: skip
    return markdown(header, lines)


def page(content: Mapping[str, Any], wanted: Sequence[Cell]) -> str:
    about = content["about"]
    command = "python benchmarks/stability.py" + ("" if about["data"] == "digits" else f" --data {about['data']}")
    lines = found(content, wanted)
    whole, stopped = sum(line.runs == len(about["seeds"]) for line in lines), sum(line.stopped for line in lines)
    return "\n\n".join(
        [
            table(content, wanted),
            f"FD-{about['data']} at two steps, mean ± standard deviation over {len(about['seeds'])} seeds, of "
            f"{about['samples']} images ({about['sets']} sets), after {about['steps']} steps of {about['batch']}. "
            "Began at: of the network that a run starts from, its teacher asked for jumps or one without training. "
            f"{stopped} of {len(content['rows'])} runs stopped on values that are not finite. Highest norm: of a "
            f"gradient, before it is clipped to 1. {whole} of {len(wanted)} cells have all seeds. "
            + measured_by(content, command),
        ]
    )


def picture(content: Mapping[str, Any], wanted: Sequence[Cell]) -> Figure:
    """A square per cell, coloured by its distance."""
    known = {line.cell: line for line in found(content, wanted)}
    groups = list(dict.fromkeys((cell.start, cell.tangent, cell.anchor) for cell in known))
    groups.sort(key=lambda group: (group[0], group[1] != "raw", group[1], not group[2]))
    columns = sorted({(cell.precision, cell.scale) for cell in known})
    values = torch.full((len(groups), len(columns)), float("nan"))
    drawn = Figure(figsize=(2.2 + 1.25 * len(columns), 1.3 + 0.55 * len(groups)), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    texts = {}
    for cell, line in known.items():
        place = groups.index((cell.start, cell.tangent, cell.anchor)), columns.index((cell.precision, cell.scale))
        values[place] = statistics.fmean(line.fd) if line.fd else float("nan")
        texts[place] = f"{line.text}\n{line.worse} of {line.runs} worse" if line.worse else line.text
    image = axes.imshow(values.log10().numpy(), cmap="viridis_r", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for (row, column), text in texts.items():
        dark = float(values[row, column].log10()) > middle
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [f"{precision}\nx{scale}" for precision, scale in columns], fontsize=8)
    named = [f"{start}, {tangent}, {'anchor' if anchor else 'no anchor'}" for start, tangent, anchor in groups]
    axes.set_yticks(range(len(groups)), named, fontsize=8)
    axes.set_title(f"FD-{content['about']['data']} at two steps", fontsize=10)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="Map where consistency training is stable.")
    parser.add_argument("--data", choices=list(TEACHERS), default="digits")
    parser.add_argument("--folder", type=Path, help="of the teachers; default: outputs/stability/DATA")
    parser.add_argument("--budget", type=float, default=60, help="CPU minutes")
    parser.add_argument("--cells", type=int, nargs="+", help="these only, counted from 0")
    parser.add_argument("--table", action="store_true", help="pages and pictures from the records; run nothing")
    parser.add_argument("--quick", action="store_true", help="two cells, a few steps; refreshes nothing")
    arguments = parser.parse_args()
    if arguments.table:
        for data in TEACHERS:
            if place(data).is_file():
                show(json.loads(place(data).read_text()))
        return
    quiet()
    data, wanted = arguments.data, cells(arguments.data)
    folder = (arguments.folder or ROOT / "outputs" / "stability" / data).absolute()
    steps, teacher_steps, seeds = (3, 3, (0,)) if arguments.quick else (STEPS[data], TEACHER_STEPS[data], SEEDS)
    if arguments.quick:
        folder, wanted = folder.with_name(f"{folder.name}_quick"), wanted[:2]
    if arguments.cells:
        wanted = [wanted[number] for number in arguments.cells]
    about = {
        "data": data, "network": " ".join((*OWN[data], *SIZE)), "steps": steps, "teacher_steps": teacher_steps,
        "batch": BATCH, "samples": SAMPLES, "sets": SETS, "seeds": list(seeds),
    }  # fmt: skip
    record = Record(folder / "quick.json" if arguments.quick else place(data), about, arguments.quick)
    Study(data, folder, record, steps, teacher_steps, time.process_time(), arguments.budget).all(wanted, seeds)
    if arguments.quick:
        print(page(record.content, wanted))
    else:
        show(record.content)


def place(data: str) -> Path:
    return RESULTS / f"stability_{data}.json"


def show(content: Mapping[str, Any]) -> None:
    data = content["about"]["data"]
    text = page(content, cells(data))
    print(text)
    keep(picture(content, cells(data)), FOLDER / f"stability_{data}.png")
    refresh(PAGE, f"stability on {data}", text)


if __name__ == "__main__":
    main()
