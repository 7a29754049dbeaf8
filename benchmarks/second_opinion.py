"""Whether two representations order the same samples alike: a small classifier's, and EfficientNet-Lite0's of ImageNet.

    python benchmarks/second_opinion.py            # goes on where it stopped; networks by samplers.py and ablation.py
    python benchmarks/second_opinion.py --quick    # a few images of the networks that come along; writes no page
    python benchmarks/second_opinion.py --table    # the page from the record; runs nothing

Each network draws one set of images, and both metrics look at it beside the same images of the train split. Teachers
and students are those of `samplers.py --data DATA` (of digits, two come with the package), the relatives those of
`ablation.py --relatives`; what is not in their folders is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from ablation import RELATIVES, _slug
from harness import RESULTS, ROOT, markdown, refresh
from short_runs import Record, measured_by, quiet, spread

sys.path.insert(0, str(ROOT / "src"))

from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.checkpoints import load_model
from flowanchor.data.base import FlowDataModule
from flowanchor.generation.generator import Generator
from flowanchor.generation.samplers import build_sampler
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.reference_base import Reference

PAGE = ROOT / "docs" / "results" / "second_opinion.md"
RECORD = RESULTS / "second_opinion.json"
SHIPPED = ROOT / "src" / "flowanchor" / "shipped"
METRICS = ("small", "efficientnet")
SEEDS = (0, 1, 2)  # of a student's training, of a teacher's noise
SAMPLES, REFERENCE = 500, 2000
CALLS = (1, 2, 8)
TITLES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}


@dataclass(frozen=True)
class Case:
    """A line of the table: networks, one per seed, and how they draw."""

    name: str
    calls: int
    words: tuple[str, ...]
    runs: tuple[Path, ...]  # one per seed


def cases(data: str, networks: Path, relatives: Path) -> list[Case]:
    """Of a data set: the relatives at two calls (digits), students by jumps, the teacher by midpoint steps."""
    found = []
    if data == "digits":
        for row in RELATIVES:
            runs = tuple(relatives / "runs" / f"{_slug(row.name)}_{seed}" for seed in SEEDS)
            found.append(Case(row.name, 2, ("sampler=from_checkpoint",), runs))
    here = {"teacher": networks / "teacher", **{f"student_{seed}": networks / f"student_{seed}" for seed in SEEDS}}
    if data == "digits":
        here |= {"teacher": SHIPPED / "digits_teacher", "student_0": SHIPPED / "digits"}
    students = tuple(here[f"student_{seed}"] for seed in SEEDS)
    found += [Case("FACM student, jumps", n, ("sampler=consistency",), students) for n in CALLS]
    found += [
        Case("its teacher, midpoint", n, ("sampler=flow", "sampler.solver=midpoint"), (here["teacher"],) * len(SEEDS))
        for n in CALLS
    ]
    return found


class First(Reference):
    """The first images of the train split: enough for an order, and cheap to look at."""

    def __init__(self, data: FlowDataModule, count: int) -> None:
        self._images = data.images("train")
        self.count = min(count, len(self._images))
        self.name, self.shape = f"{data.name}, {self.count:,} of the train split", (data.channels, data.size, data.size)

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self._images.digest()} {self.count}".encode()).hexdigest()

    @property
    def n(self) -> int:
        return self.count

    def chunks(self, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, self.count, batch_size):
            yield self._images.stack(range(start, min(start + batch_size, self.count)))


@dataclass
class Eyes:
    """Both metrics on one data set."""

    data: str
    samples: int = SAMPLES
    reference: int = REFERENCE
    evaluators: dict[str, Evaluator] = field(init=False)

    def __post_init__(self) -> None:
        data = instantiate(compose(f"data={self.data}").data)
        self.codec = instantiate(compose().codec)
        self.evaluators = {
            name: Evaluator(
                compose(f"metric={name}", program="eval").metric, data, batch_size=25,
                reference=First(data, self.reference),
            )
            for name in METRICS
        }  # fmt: skip
        self.held_out = data.images("heldout").stack(range(self.samples))

    def distances(self, images: Tensor) -> dict[str, float]:
        """Of uint8 images [N, C, H, W], by the name of the metric."""
        found = {}
        for name, evaluator in self.evaluators.items():
            collected = evaluator.collect(images.split(25), evaluator.wanted(len(images)))
            found[name] = float(evaluator.score_collected(collected).fd)
        return found

    def drawn(self, run: Path, case: Case, seed: int) -> Tensor:
        """Images of balanced classes, uint8 [N, C, H, W]."""
        model = load_model(run)
        sampler = build_sampler(compose(*case.words, program="eval").sampler, model)
        generator = Generator(model.backbone, model.interval, sampler.with_nfe(case.calls), self.codec)
        request = model.backbone.conditioning.request(self.samples, None, None, None, "balanced", seed)
        return torch.cat([chunk.permute(0, 3, 1, 2) for chunk in generator.draw(request, seed, 250)])


def measure(record: Record, data: str, found: Sequence[Case], eyes: Eyes) -> None:
    if record.find(data=data, case="held-out images") is None:
        record.add({"data": data, "case": "held-out images", "calls": 0, "fd": eyes.distances(eyes.held_out)})
    for case, seed in itertools.product(found, SEEDS):
        place = case.runs[seed]
        if not (place / "checkpoints" / "last.ckpt").is_file() and not (place / "model.safetensors").is_file():
            print(f"left out, for {place} is not there: {case.name}, seed {seed}", flush=True)
            continue
        if record.find(data=data, case=case.name, calls=case.calls, seed=seed) is None:
            fd = eyes.distances(eyes.drawn(place, case, seed))
            record.add({"data": data, "case": case.name, "calls": case.calls, "seed": seed, "fd": fd})
            print(data, case.name, case.calls, seed, fd, flush=True)


def agreement(rows: Mapping[Any, Sequence[Mapping[str, float]]]) -> tuple[float, int, int, int]:
    """Kendall's tau of the means, and of the pairs of lines that each metric tells apart, how many both order alike.

    `rows`: of each line the distances by metric, one for each seed, whose noise all lines share. A metric tells two
    lines apart where one of them is ahead in every seed. Returns tau, pairs that both tell apart, those of them in the
    same order, all pairs.
    """
    means = [[statistics.fmean(one[metric] for one in found) for found in rows.values()] for metric in METRICS]
    told = alike = every = 0
    for a, b in itertools.combinations(rows.values(), 2):
        every += 1
        ahead = [{one[metric] < other[metric] for one, other in zip(a, b, strict=True)} for metric in METRICS]
        if all(len(verdicts) == 1 for verdicts in ahead):
            told += 1
            alike += ahead[0] == ahead[1]
    return float(kendalltau(*means).statistic), told, alike, every


def page(content: Mapping[str, Any]) -> str:
    about, text = content["about"], []
    for data, title in TITLES.items():
        mine = [row for row in content["rows"] if row["data"] == data]
        lines: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
        for row in mine:
            if "seed" in row:
                lines.setdefault((row["case"], row["calls"]), {})[row["seed"]] = row["fd"]
        whole = {
            key: [found[seed] for seed in about["seeds"]]
            for key, found in lines.items()
            if set(found) == set(about["seeds"])
        }
        if not whole:
            continue
        ranks = {
            metric: sorted(whole, key=lambda key: statistics.fmean(one[metric] for one in whole[key]))  # noqa: B023
            for metric in METRICS
        }
        body = [
            [
                name, calls, *(spread([one[metric] for one in found]) for metric in METRICS),
                *(ranks[metric].index((name, calls)) + 1 for metric in METRICS),
            ]
            for (name, calls), found in whole.items()
        ]  # fmt: skip
        floor = next((row["fd"] for row in mine if row["case"] == "held-out images"), None)
        if floor is not None:
            body.append(["held-out images", "", *(f"{floor[metric]:.2f}" for metric in METRICS), "", ""])
        header = ("drawn by", "calls", f"FD-{data}", "FD-EfficientNet", "rank", "rank")
        tau, told, alike, every = agreement(whole)
        text += [
            f"**{title}**",
            markdown(header, body),
            f"Kendall's tau of the means: {tau:.2f}. Of {every} pairs of lines both metrics tell {told} apart (one is "
            f"ahead in every seed), and order {alike} of these alike.",
        ]
    text.append(
        f"Mean ± standard deviation over {len(about['seeds'])} seeds (of a student's training, and of the noise, which "
        f"all lines share), {about['samples']} images each, against {about['reference']:,} images of the train split, "
        f"or all. Measured by " + measured_by(content, "python benchmarks/second_opinion.py")
    )
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two representations, one set of images.")
    parser.add_argument("--networks", type=Path, default=ROOT / "outputs" / "samplers", help="of samplers.py, by data")
    parser.add_argument(
        "--relatives", type=Path, default=ROOT / "outputs" / "ablation_relatives", help="of ablation.py"
    )
    parser.add_argument("--data", choices=list(TITLES), nargs="+", default=list(TITLES))
    parser.add_argument("--table", action="store_true", help="the page from the record; run nothing")
    parser.add_argument("--quick", action="store_true", help="few images of what comes along; refreshes nothing")
    arguments = parser.parse_args()
    if arguments.table:
        refresh(PAGE, "second opinion", page(json.loads(RECORD.read_text())))
        return
    quiet()
    torch.set_num_threads(1)
    samples = 20 if arguments.quick else SAMPLES
    about = {"samples": samples, "reference": 40 if arguments.quick else REFERENCE, "seeds": list(SEEDS)}
    place = ROOT / "outputs" / "second_opinion_quick.json" if arguments.quick else RECORD
    record = Record(place, about, arguments.quick)
    for data in ["digits"] if arguments.quick else arguments.data:
        found = cases(data, (arguments.networks / data).absolute(), arguments.relatives.absolute())
        measure(record, data, found, Eyes(data, samples, about["reference"]))
    print(page(record.content))
    if not arguments.quick:
        refresh(PAGE, "second opinion", page(record.content))


if __name__ == "__main__":
    main()
