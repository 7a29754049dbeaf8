"""What a teacher and a student of emoji draw from the same noise, and which training picture is nearest to each.

    python benchmarks/emoji.py       # the runs of experiment=emoji_teacher and emoji_facm; refreshes docs/emoji.md

Under each sample of the student stands the picture of the training set that is nearest to it, plain or mirrored, by the
root mean square of the difference of their pixels (black is 0, white is 1): so one sees what was learned by heart. The
table has the median of that distance over more samples, for each way to draw, and the same for pictures that were held
out. Time is CPU time on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

sys.path.insert(0, str(ROOT / "src"))

import flowanchor
from flowanchor.base.trusted import build
from flowanchor.reporting.grids import labelled_grid

STUDENT_STEPS, TEACHER_STEPS, SHOWN = (1, 2, 4), 16, 2
COLUMNS, SCALE, COLOURS = 12, 2, 128


def pixels(images: Any) -> np.ndarray:
    """uint8 [N, H, W, C] -> float32 [N, H W C], black 0 and white 1."""
    return np.asarray(images, dtype=np.float32).reshape(len(images), -1) / 255


def nearest(samples: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of uint8 samples [N, H, W, C] the nearest of uint8 training pictures [M, H, W, C] or of their mirrored copies.

    Returns those pictures, turned as they are nearer [N, H, W, C], and the distances [N].
    """
    both = np.concatenate([training, training[:, :, ::-1]])
    ours, theirs = pixels(samples).astype(np.float64), pixels(both).astype(np.float64)
    squares = (ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T
    chosen = squares.argmin(1)
    return both[chosen], np.sqrt(squares[np.arange(len(ours)), chosen].clip(min=0) / ours.shape[1])


def draw(model: Any, labels: list[int], steps: int) -> tuple[np.ndarray, float]:
    """uint8 [N, H, W, C] and the CPU seconds of one of them."""
    start = time.process_time()
    images = model.sample(labels, steps=steps, seed=0).numpy()
    return images, (time.process_time() - start) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="outputs/train/emoji_teacher")
    parser.add_argument("--student", default="outputs/train/emoji_facm")
    parser.add_argument("--samples", type=int, default=100, help="of each class, for the table")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "emoji.png")
    parser.add_argument(
        "--keep", action="store_true", help="write the picture alone; leave table and record as they are"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    teacher, student = flowanchor.load(arguments.teacher), flowanchor.load(arguments.student)
    data = build(student.config["data"])
    parts = {name: data.images(name) for name in ("train", "heldout")}
    training, heldout = (
        part.stack(range(len(part))).permute(0, 2, 3, 1).numpy() for part in (parts["train"], parts["heldout"])
    )
    names, count = data.class_names, arguments.samples
    labels = [label for label in range(len(names)) for _ in range(count)]
    # Noise belongs to the number of a sample, so that all of these draw from the same.
    drawn = {f"student, {steps} evaluations": draw(student, labels, steps) for steps in STUDENT_STEPS}
    drawn[f"teacher, {TEACHER_STEPS} evaluations"] = draw(teacher, labels, TEACHER_STEPS)

    rows, titles = [], []
    for label, name in enumerate(names):
        first = slice(label * count, label * count + COLUMNS)
        shown = drawn[f"student, {SHOWN} evaluations"][0][first]
        rows += [drawn[f"teacher, {TEACHER_STEPS} evaluations"][0][first], shown, nearest(shown, training)[0]]
        titles += [
            f"{name}: teacher, {TEACHER_STEPS} evaluations",
            f"student, {SHOWN} evaluations",
            "nearest it was trained on",
        ]
    picture = labelled_grid(np.concatenate(rows), columns=COLUMNS, row_names=titles, scale=SCALE)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        arguments.picture, optimize=True
    )
    print(f"{arguments.picture}: {picture.width} x {picture.height}, {arguments.picture.stat().st_size:,} bytes")

    figures = {
        name: {
            "milliseconds": 1000 * seconds,
            "distance": [
                statistics.median(nearest(images[i * count : (i + 1) * count], training)[1]) for i in range(len(names))
            ],
        }
        for name, (images, seconds) in drawn.items()
    }
    figures["held-out pictures"] = {
        "distance": [
            statistics.median(nearest(heldout[parts["heldout"].labels == i], training)[1]) for i in range(len(names))
        ]
    }
    table = markdown(
        ["", "milliseconds each", *(f"{name}: distance to the nearest" for name in names)],
        [
            [
                name,
                f"{found['milliseconds']:.1f}" if "milliseconds" in found else "",
                *(f"{d:.3f}" for d in found["distance"]),
            ]
            for name, found in figures.items()
        ],
    )
    print(table)
    if arguments.keep:
        return
    about = machine()
    told = (
        f"Medians over {count} samples of each class; {len(training)} training pictures, {len(heldout)} held out. "
        f"Steps trained: teacher {teacher.step:,}, student {student.step:,}. Measured by `python benchmarks/emoji.py` "
        f"on {about['cpu']}, torch {about['torch']}, {about['date']}, commit {about['commit']}."
    )
    write_json(
        RESULTS / "emoji.json",
        {"machine": about, "figures": figures, "steps": {"teacher": teacher.step, "student": student.step}},
    )
    refresh(ROOT / "docs" / "emoji.md", "emoji table", f"{table}\n\n{told}")


if __name__ == "__main__":
    main()
