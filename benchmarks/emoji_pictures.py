"""What a teacher and a student of emoji draw from the same noise, and which training picture is nearest to each.

    python benchmarks/emoji_pictures.py     # of the runs emoji_teacher and emoji_facm; refreshes docs/emoji.md

Grids side by side, place for place: the teacher's samples, the student's from the same noise, and of the training set
the picture that is nearest to the last of these, plain or mirrored, by the root mean square of the difference of their
pixels (black is 0, white is 1): so one sees what was learned by heart. The table has the median and the least of that
distance over more samples for each way to draw, and for pictures that were held out. Time is CPU time on one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

sys.path.insert(0, str(ROOT / "src"))

import flowanchor
from flowanchor.base.trusted import build
from flowanchor.plugins.data.emoji import CLASSES, EmojiDataModule
from flowanchor.reporting.grids import join, labelled_grid

STUDENT_STEPS, TEACHER_STEPS, SHOWN = (1, 2, 4), 16, 2
COLUMNS, ROWS, TARGET, COLOURS = 6, 2, 48, 160  # of the picture: per class and grid; pixels of a sample; its palette
PAGE = ROOT / "docs" / "emoji.md"


def nearest(samples: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of samples [N, H, W, C] the nearest of the training pictures [M, H, W, C] or of their mirrored copies, all uint8.

    Returns those [N, H, W, C], turned as they are nearer, and the distances [N].
    """
    both = np.concatenate([training, training[:, :, ::-1]])
    ours, theirs = (images.reshape(len(images), -1) / 255 for images in (samples, both))
    squares = (ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T
    chosen = squares.argmin(1)
    return both[chosen], np.sqrt(squares[np.arange(len(ours)), chosen].clip(min=0) / ours.shape[1])


def draw(model: Any, labels: list[int], steps: int) -> tuple[np.ndarray, float]:
    """uint8 [N, H, W, C] and the CPU milliseconds of one of them. Noise belongs to the number of a sample."""
    start = time.process_time()
    solver = {"solver": "euler"} if model.kind == "flow" else {}  # one call a step, as the student's
    images = model.sample(labels, steps=steps, seed=0, **solver).numpy()
    return images, 1000 * (time.process_time() - start) / len(labels)


def in_memory(part: Any) -> np.ndarray:
    """A set of images as uint8 [N, H, W, C]."""
    return part.stack(range(len(part))).permute(0, 2, 3, 1).numpy()


def picture(titles: list[str], grids: list[np.ndarray], names: tuple[str, ...]) -> Image.Image:
    """The grids side by side, `ROWS` rows for each class, whose names stand beside the first."""
    rows = [name for name in names for name in (name, *[""] * (ROWS - 1))]
    scale = max(1, TARGET // grids[0].shape[1])
    made = [
        labelled_grid(grid, columns=COLUMNS, row_names=[] if place else rows, scale=scale)
        for place, grid in enumerate(grids)
    ]
    return join(made, titles).quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def class_table(font: Path) -> str:
    """How many pictures each class has."""
    rows = []
    for name in CLASSES:
        data = EmojiDataModule(str(font), [name], 1, batch_size=1)
        rows.append([f"`{name}`", len(data.images("train")), len(data.images("heldout"))])
    return markdown(["class", "to train on", "held out"], rows)


def table(figures: dict[str, Any], kinds: Sequence[str]) -> str:
    """A row per way of drawing."""
    return markdown(
        ["", "ms each", *(f"{name}: distance to the nearest, least" for name in kinds)],
        [
            [
                title,
                f"{found['milliseconds']:.0f}" if "milliseconds" in found else "",
                *(f"{median:.3f}, {least:.3f}" for median, least in found["distance"]),
            ]
            for title, found in figures.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="outputs/train/emoji_teacher")
    parser.add_argument("--student", default="outputs/train/emoji_facm", help="none: the teacher alone")
    parser.add_argument("--samples", type=int, default=100, help="of each class, for the table")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "emoji.png")
    parser.add_argument("--keep", action="store_true", help="the picture alone; table and record stay as they are")
    asked = parser.parse_args()

    torch.set_num_threads(1)
    teacher = flowanchor.load(asked.teacher)
    student = None if asked.student == "none" else flowanchor.load(asked.student)
    data = build(teacher.config["data"], "data", teacher.path)
    training, heldout, kinds = in_memory(data.images("train")), in_memory(data.images("heldout")), data.class_names
    labels = [label for label in range(len(kinds)) for _ in range(asked.samples)]
    ways = [(f"teacher, {TEACHER_STEPS} evaluations", teacher, TEACHER_STEPS)]
    ways += [(f"student, {n} evaluation{'s' * (n > 1)}", student, n) for n in STUDENT_STEPS if student is not None]
    drawn = {title: draw(model, labels, steps) for title, model, steps in ways}

    titles = [title for title, _, steps in ways if steps in (TEACHER_STEPS, SHOWN)]
    first = [label * asked.samples + place for label in range(len(kinds)) for place in range(ROWS * COLUMNS)]
    grids = [drawn[title][0][first] for title in titles]
    shown = picture([*titles, "nearest picture of the training set"], [*grids, nearest(grids[-1], training)[0]], kinds)
    asked.picture.parent.mkdir(parents=True, exist_ok=True)
    shown.save(asked.picture, optimize=True)
    print(f"{asked.picture}: {shown.width} x {shown.height}, {asked.picture.stat().st_size:,} bytes")

    def distances(images: np.ndarray, of: np.ndarray) -> list[tuple[float, float]]:
        """Median and least of each class."""
        found = [nearest(images[of == label], training)[1] for label in range(len(kinds))]
        return [(float(np.median(one)), float(one.min())) for one in found]

    figures: dict[str, Any] = {
        title: {"milliseconds": taken, "distance": distances(images, np.asarray(labels))}
        for title, (images, taken) in drawn.items()
    }
    figures["held-out pictures"] = {"distance": distances(heldout, data.images("heldout").labels)}
    print(table(figures, kinds))
    if asked.keep:
        return
    about, steps = machine(), {"teacher": teacher.step} | ({} if student is None else {"student": student.step})
    trained = ", ".join(f"{name} {count:,}" for name, count in steps.items())
    told = (
        f"Median and least over {asked.samples} samples of each class; {len(training)} training pictures, "
        f"{len(heldout)} held out. Steps trained: {trained}. Measured by `python benchmarks/emoji_pictures.py` "
        f"on {about['cpu']}, torch {about['torch']}, {about['date']}, commit {about['commit']}."
    )
    write_json(RESULTS / "emoji.json", {"machine": about, "figures": figures, "steps": steps})
    refresh(PAGE, "emoji table", f"{table(figures, kinds)}\n\n{told}")
    refresh(PAGE, "emoji classes", class_table(data.font))


if __name__ == "__main__":
    main()
