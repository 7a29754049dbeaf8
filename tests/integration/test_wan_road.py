"""Text to image from end to end: captioned digits, encoded; a teacher; FACM; samples by prompt; all by the commands."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

ROOT = Path(__file__).parents[2]
NAMES = "zero one two three four five six seven eight nine".split()
PHRASES = ("a handwritten {}", "the digit {}", "someone wrote a {} by hand")


Run = Callable[..., None]


def as_a_user(folder: Path, program: str, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "src" / program), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def load_module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def captioned(folder: Path, count: int) -> None:
    digits, rows = load_digits(), []
    folder.mkdir()
    for number, (image, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        Image.fromarray((image / 16 * 255).round().astype("uint8")).save(folder / f"{number:04d}.png")
        rows.append(json.dumps({"file": f"{number:04d}.png", "caption": [p.format(NAMES[label]) for p in PHRASES]}))
    (folder / "captions.jsonl").write_text("\n".join(rows))


def encode(run: Run, folder: Path, count: int) -> None:
    captioned(folder / "images", count)
    run(
        folder, "encode.py", "data=captions", "data.root=images", "codec=identity", "text_encoder=minilm",
        "image_size=8", "captions.multiple=8", "captions.max_ratio=1", "num_workers=0", "out=data/captioned_digits",
    )  # fmt: skip


def sample(run: Run, folder: Path, checkpoint: str, steps: int, count: int, *more: str) -> np.ndarray:
    (folder / "prompts.txt").write_text("\n".join(PHRASES[0].format(name) for name in NAMES))
    out = f"drawn/{Path(checkpoint).name}_{steps}"
    run(
        folder, "sample.py", f"checkpoint={checkpoint}", "prompts=prompts.txt", f"sampler.steps={steps}",
        f"num_samples={count}", f"hydra.run.dir={out}", *more,
    )  # fmt: skip
    assert (folder / out / "grid.png").is_file()
    return np.load(folder / out / "samples.npz")["images"]


@pytest.mark.slow
def test_the_road_in_a_few_steps(tmp_path, command, capsys):
    """Every program runs, and a network that was opened again draws what `sample.py` drew."""

    def run(folder: Path, program: str, *words: str) -> None:
        command({"eval.py": "evaluate"}.get(program, program.removesuffix(".py")), *words)

    encode(run, tmp_path, 48)
    short = (
        "trainer.max_steps=2", "backbone.num_layers=2", "callbacks.sample_grid.per_class=1", "data.batch_size=8",
        "callbacks.sample_grid.nfe=[2]", "trainer.limit_val_batches=1",
    )  # fmt: skip
    run(tmp_path, "train.py", "experiment=wan_nano_teacher", *short)
    run(tmp_path, "train.py", "experiment=wan_nano", "teacher.checkpoint=outputs/train/wan_nano_teacher", *short)
    for name in ("wan_nano_teacher", "wan_nano"):
        assert (tmp_path / "outputs" / "train" / name / "samples" / "step_00000002.png").is_file()
        theirs = sample(run, tmp_path, f"outputs/train/{name}", 2, 20)
        assert theirs.shape == (20, 8, 8, 3)
    import flowanchor

    model = flowanchor.load(tmp_path / "outputs" / "train" / "wan_nano")
    drawn = model.sample(prompts=[PHRASES[0].format(name) for name in NAMES], steps=2)
    assert np.abs(drawn.numpy().astype(int) - theirs[:10].astype(int)).max() <= 1
    measure(run, tmp_path, capsys, theirs)


def measure(run: Run, folder: Path, capsys: pytest.CaptureFixture[str], theirs: np.ndarray) -> None:
    """`eval.py metric=t2i` scores the images that `sample.py` drew, and says what is missing in one sentence.

    theirs: those of two steps, of the ten prompts and again.
    """
    clips = load_module(ROOT / "tests" / "metrics" / "clips.py")
    clips.write_clip(folder / "clip", seed=5)  # one that finds prompts and images alike: a score is 0 at least
    checkpoint = ("checkpoint=outputs/train/wan_nano", "num_samples=20", "device=cpu")
    asked = (*checkpoint, "metric=t2i", "metric.clip=clip", "metric.cache_dir=cache", "prompts=prompts.txt")
    run(
        folder, "eval.py", *asked, "reference=images", "nfe=[1,2]", "batch_size=8", "save_samples=true",
        "hydra.run.dir=measured",
    )  # fmt: skip
    report = json.loads((folder / "measured" / "metrics.json").read_text())
    line = report["results"][1]
    with np.load(folder / "measured" / "samples" / "nfe2.npz") as stored:
        images, numbers = stored["images"], stored["labels"]
    assert np.abs(images.astype(int) - theirs.astype(int)).max() <= 1 and (numbers == np.arange(20) % 10).all()
    low = sample(run, folder, "outputs/train/wan_nano", 2, 20, "dtype=bfloat16").astype(int)
    assert 0 < np.abs(images - low).mean() < 5, "nearly the same images, computed in bfloat16"
    prompts = (folder / "prompts.txt").read_text().splitlines()
    cosines = clips.cosines(folder / "clip", torch.from_numpy(images).permute(0, 3, 1, 2), prompts * 2)
    assert 5 < line["clip_score"] == pytest.approx(100 * float(cosines.mean()), rel=1e-3)
    assert line["n"] == 20 and report["settings"]["prompts"]["n"] == 10 and line["fd"] > 0
    assert (folder / "measured" / "quality.png").is_file()
    for words, sentence in (
        ((*checkpoint, "metric=random", "reference=images"), "add prompts=FILE"),
        (asked, "add reference=FOLDER of images"),
        ((*asked[:-1], "prompts=nowhere.txt", "reference=images"), "nowhere.txt"),
        ((*asked, "reference=images", "dtype=int8"), "dtype=int8 is not known"),
        ((*asked, "metric.clip=null", "reference=images"), "add metric.clip=FOLDER"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(folder, "eval.py", *words)
        said = capsys.readouterr().err
        assert ended.value.code == 1 and sentence in " ".join(said.split()) and "Traceback" not in said


class Reader(nn.Sequential):
    """A small classifier of real digits."""

    def __init__(self) -> None:
        convolutions = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
        super().__init__(
            *convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def learn(self) -> float:
        """Trained on four fifths of the digits; returns its accuracy on the others."""
        torch.manual_seed(0)
        digits = load_digits()
        x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
        order = torch.randperm(len(x))
        train, test = order[360:], order[:360]
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        for _ in range(15):
            for rows in train[torch.randperm(len(train))].split(64):
                loss = nn.functional.cross_entropy(self(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return (self(x[test]).argmax(1) == y[test]).float().mean().item()

    def read(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, 8, 8, 3] -> digits [N]."""
        grey = torch.from_numpy(images).float().mean(-1)[:, None] / 127.5 - 1
        with torch.no_grad():
            return self(grey).argmax(1).numpy()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_prompted_digit_is_drawn(tmp_path):
    """A classifier of real digits reads the prompted one in 85 % of two-step samples at least."""
    run = as_a_user
    encode(run, tmp_path, 1797)
    run(tmp_path, "train.py", "experiment=wan_nano_teacher")
    run(tmp_path, "train.py", "experiment=wan_nano", "teacher.checkpoint=outputs/train/wan_nano_teacher")
    reader = Reader()
    assert reader.learn() >= 0.95
    prompted = np.arange(400) % 10
    rates = {}
    for name, steps in (("wan_nano_teacher", 40), ("wan_nano", 1), ("wan_nano", 2), ("wan_nano", 4)):
        drawn = sample(run, tmp_path, f"outputs/train/{name}", steps, 400)
        rates[name, steps] = float((reader.read(drawn) == prompted).mean())
    print(rates)
    assert rates["wan_nano", 2] >= 0.85 and rates["wan_nano", 2] >= rates["wan_nano_teacher", 40] - 0.05, rates
    assert rates["wan_nano", 4] >= 0.85, rates  # more steps do not spoil it
