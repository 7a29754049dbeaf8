"""A tiny Wan learns digits by prompt: how many of its samples show the prompted digit, by seed and `tangent_smoothing`.

    python benchmarks/wan_digits.py                  # an hour on 2 cores; goes on where it stopped
    python benchmarks/wan_digits.py --jobs 4         # four runs at once
    python benchmarks/wan_digits.py --quick          # a few steps: shows that it runs, writes no page

Runs the commands of docs/captions.md in outputs/wan_digits: encode, a teacher, and students that differ in their seed
and in `backbone.tangent_smoothing`. The judge is a support vector machine that learned four fifths of scikit-learn's
digits. Writes benchmarks/results/wan_digits.json and refreshes table and picture of docs/wan.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

NAMES = "zero one two three four five six seven eight nine".split()
PHRASES = ("a handwritten {}", "the digit {}", "someone wrote a {} by hand")
WIDTHS = (0.0, 0.003, 0.01, 0.03)  # of the Gaussian, in units of time
SEEDS = (0, 1, 2)
STEPS = (1, 2, 4, 8)
SHOWN = "smoothing0.01_seed0"  # whose last samples are the page's picture
TEACHER, TEACHER_STEPS = "wan_nano_teacher", 40


class Judge:
    """Reads digits; `accuracy` on those that it did not learn from."""

    def __init__(self) -> None:
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        seen, unseen = order[360:], order[:360]
        self.machine = SVC(gamma=0.001).fit(digits.data[seen], digits.target[seen])
        self.accuracy = float(self.machine.score(digits.data[unseen], digits.target[unseen]))

    def share(self, images: np.ndarray) -> float:
        """uint8 [N, 8, 8, 3], sample i prompted with the digit i % 10 -> the share that shows it."""
        read = self.machine.predict(images.astype(float).mean(-1).reshape(len(images), 64) / 255 * 16)
        return float((read == np.arange(len(images)) % 10).mean())


def captioned(folder: Path) -> None:
    """Digits as pictures, with a table of three captions each."""
    digits, rows = load_digits(), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        Image.fromarray((image / 16 * 255).round().astype("uint8")).save(folder / f"{number:04d}.png")
        captions = [phrase.format(NAMES[label]) for phrase in PHRASES]
        rows.append(json.dumps({"file": f"{number:04d}.png", "caption": captions}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    (folder.parent / "prompts.txt").write_text("\n".join(PHRASES[0].format(name) for name in NAMES))


def run(folder: Path, program: str, *words: str) -> None:
    """A program of this project in a process of its own, on one thread."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "src" / program), *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def shares(
    folder: Path, name: str, steps: tuple[int, ...], samples: int, judge: Judge, *sampler: str
) -> dict[str, float]:
    """By number of steps."""
    found = {}
    for count in steps:
        run(
            folder, "sample.py", f"checkpoint=outputs/train/{name}", "prompts=prompts.txt", f"sampler.steps={count}",
            f"num_samples={samples}", "seed=0", f"hydra.run.dir=drawn/{name}_{count}", *sampler,
        )  # fmt: skip
        found[str(count)] = judge.share(np.load(folder / "drawn" / f"{name}_{count}" / "samples.npz")["images"])
    return found


def last_logged(folder: Path, name: str) -> dict[str, float]:
    """Means over the last quarter of what a run logged."""
    with (folder / "outputs" / "train" / name / "csv" / "metrics.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("train/tangent_norm")]
    rows = rows[-max(1, len(rows) // 4) :]
    names = {"train/tangent_norm": "tangent_norm", "train/shortcut_clamp_share": "clamp_share"}
    return {ours: statistics.mean(float(row[theirs]) for row in rows) for theirs, ours in names.items()}


def student(folder: Path, width: float, seed: int, words: list[str], samples: int, judge: Judge) -> dict[str, Any]:
    """Train and judge one, unless that was done before."""
    name = f"smoothing{width:g}_seed{seed}"
    kept = folder / f"{name}.json"
    if not kept.is_file():
        run(
            folder, "train.py", "experiment=wan_nano", f"teacher.checkpoint=outputs/train/{TEACHER}", f"name={name}",
            f"backbone.tangent_smoothing={width}", f"seed={seed}", *words,
        )  # fmt: skip
        content = {"width": width, "seed": seed, "shares": shares(folder, name, STEPS, samples, judge)}
        write_json(kept, {**content, **last_logged(folder, name)})
    found: dict[str, Any] = json.loads(kept.read_text())
    print(found, flush=True)
    return found


def table(students: list[dict[str, Any]]) -> str:
    """A line per width: the range over the seeds."""
    rows = []
    for width in sorted({one["width"] for one in students}):
        own = [one for one in students if one["width"] == width]
        cells = [_range([100 * one["shares"][str(steps)] for one in own], digits=1) for steps in STEPS]
        norm, clamp = ([one[key] for one in own] for key in ("tangent_norm", "clamp_share"))
        rows.append([f"{width:g}" if width else "0 (exact)", *cells, _range(norm), _range([100 * x for x in clamp])])
    header = ["`tangent_smoothing`", *(f"{n} step{'s' * (n > 1)}, %" for n in STEPS), "norm of dF/dt", "clamped, %"]
    return markdown(header, rows)


def page(content: dict[str, Any]) -> str:
    """The table with its caption."""
    about = content["machine"]
    caption = (
        f"Share of {content['samples']} samples that show the prompted digit, range over {len(SEEDS)} seeds; the "
        f"teacher's in {TEACHER_STEPS} steps: {100 * content['teacher'][str(TEACHER_STEPS)]:.1f} %. The judge, a "
        f"support vector machine, reads {100 * content['judge']:.1f} % of held-out digits. Norm of the tangent and "
        f"share of clamped residuals: means over the last quarter of the training. {about['cores']} cores of "
        f"{about['cpu']}, torch {about['torch']}, {about['date']}, commit {about['commit']}."
    )
    return f"{table(content['students'])}\n\n{caption}"


def _range(values: list[float], digits: int = 0) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="two students of a few steps; no page is written")
    arguments = parser.parse_args()
    folder = ROOT / "outputs" / ("wan_digits_quick" if arguments.quick else "wan_digits")
    judge = Judge()
    words = ["callbacks.sample_grid.every_n_steps=100000"]
    words += ["trainer.max_steps=2", "trainer.log_every_n_steps=1"] if arguments.quick else []
    if not (folder / "data" / "captioned_digits" / "manifest.json").is_file():
        captioned(folder / "images")
        run(
            folder, "encode.py", "data=captions", "data.root=images", "codec=identity", "text_encoder=minilm",
            "image_size=8", "captions.multiple=8", "captions.max_ratio=1", "out=data/captioned_digits",
        )  # fmt: skip
    run(folder, "train.py", f"experiment={TEACHER}", *words)  # an ended run ends at once
    teacher = shares(folder, TEACHER, (TEACHER_STEPS,), arguments.samples, judge, "sampler.solver=euler")
    print(f"judge {judge.accuracy:.3f}, teacher {teacher}", flush=True)
    cells = [(width, seed) for seed in SEEDS for width in WIDTHS]
    if arguments.quick:
        cells = cells[:2]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(student, folder, *cell, words, arguments.samples, judge) for cell in cells]
        students = [job.result() for job in jobs]
    if arguments.quick:
        print(table(students))
        return
    content = {"machine": machine(), "judge": judge.accuracy, "teacher": teacher, "samples": arguments.samples}
    content["students"] = students
    print(page(content))
    write_json(RESULTS / "wan_digits.json", content)
    refresh(ROOT / "docs" / "wan.md", "wan digits table", page(content))
    shown = sorted((folder / "outputs" / "train" / SHOWN / "samples").glob("*.png"))
    shutil.copyfile(shown[-1], ROOT / "docs" / "images" / "wan_digits.png")


if __name__ == "__main__":
    main()
