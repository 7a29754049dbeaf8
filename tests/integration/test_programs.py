"""What users do in a row: sweep, train two stages, draw, measure."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from flowanchor.checkpoints import load_model
from flowanchor.reporting.pictures import read_facts

SHORT = ["callbacks=default", "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=1"]


@pytest.fixture
def stages(command, tiny):
    """A teacher, and a student distilled from it, each trained for a moment."""
    command("train", *tiny, *SHORT, "experiment=digits_teacher", "optimizer.lr=1e-2")
    teacher = "teacher.checkpoint=outputs/train/digits_teacher"
    return command("train", *tiny, *SHORT, "experiment=digits_facm", teacher, "log_every_n_steps=1")


def test_two_stages_then_samples_and_scores(stages, command, capsys):
    run = stages / "outputs" / "train" / "digits_facm"
    assert {"config.yaml", "provenance.json", "csv", "samples", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert {"last.ckpt", "best.ckpt"} == {path.name for path in (run / "checkpoints").iterdir()}
    record = json.loads((run / "provenance.json").read_text())
    assert "experiment=digits_facm" in record["command"] and record["packages"]["torch"]
    with open(run / "csv" / "metrics.csv") as file:
        columns = set(next(csv.reader(file)))
    terms = {"loss", "anchor", "shortcut", "tangent_norm", "shortcut_clamp_share", "grad_norm", "nonfinite_steps"}
    assert {f"train/{name}" for name in terms} <= columns and "val/loss" in columns

    choice = ["sampler=consistency", "sampler.steps=2", "num_samples=64", "seed=0"]
    command("sample", f"checkpoint={run}", *choice, "name=drawn")
    drawn = stages / "outputs" / "sample" / "drawn"
    with np.load(drawn / "samples.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (64, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(64)]
    assert Image.open(drawn / "grid.png").width > 8 * 8
    files = sorted((drawn / "images").iterdir())
    assert [file.name for file in files[:12]] == [f"{i:05d}_{i % 10}.png" for i in range(12)] and len(files) == 64
    facts = read_facts(files[13])
    assert (facts["seed"], facts["nfe"], facts["class"], facts["index"]) == (0, 2, "3", 13)
    model = load_model(run)
    assert model.class_names == tuple("0123456789") and facts["checkpoint"] == model.digest
    with Image.open(files[13]) as file:
        assert np.array_equal(np.asarray(file)[16::32, 16::32], images[13, ..., 0])
    command("sample", f"checkpoint={run}", *choice, "name=again", "batch_size=7")
    with np.load(stages / "outputs" / "sample" / "again" / "samples.npz") as file:
        assert np.array_equal(file["images"], images)
    command("sample", f"checkpoint={run}", *choice, "name=other", "seed=1", "classes=[3]")
    with np.load(stages / "outputs" / "sample" / "other" / "samples.npz") as file:
        assert not np.array_equal(file["images"], images) and set(file["labels"].tolist()) == {3}
    by_name = ["classes=['7','3']", "out=my pictures", "trajectory=gif", "num_samples=4", "grid_images=2", "scale=1"]
    command("sample", f"checkpoint={run}", "sampler.steps=2", *by_name, "name=files")
    names = [f"0000{i}_{'73'[i % 2]}.png" for i in range(4)]
    assert sorted(path.name for path in (stages / "my pictures").iterdir()) == [*names, "grid.png", "trajectory.gif"]
    assert not (stages / "outputs" / "sample" / "files" / "samples.npz").exists()  # out= was given, npz=true was not
    with Image.open(stages / "my pictures" / "trajectory.gif") as film:
        assert film.n_frames == 3
    with Image.open(stages / "my pictures" / names[0]) as file:
        assert file.size == (8, 8)


def test_the_student_starts_from_the_teachers_average(command, tiny):
    command("train", *tiny, *SHORT, "experiment=digits_teacher", "optimizer.lr=1e-2")
    teacher = "teacher.checkpoint=outputs/train/digits_teacher"
    still = ["optimizer.lr=0.0", "trainer.max_steps=1"]
    folder = command("train", *tiny, *SHORT, *still, "experiment=digits_facm", teacher)
    student = load_model(folder / "outputs" / "train" / "digits_facm", ema="none").backbone.state_dict()
    average = load_model(folder / "outputs" / "train" / "digits_teacher").backbone.state_dict()
    raw = load_model(folder / "outputs" / "train" / "digits_teacher", ema="none").backbone.state_dict()
    assert all((student[key] == average[key]).all() for key in average)
    assert any((student[key] != raw[key]).any() for key in raw)


def test_a_sweep_gives_each_job_its_folder_and_its_settings(command, tiny):
    sweep = ["-m", "objective=facm,flow_matching", "seed=0,1", *tiny, "trainer.fast_dev_run=true"]
    folder = command("train", *sweep)
    (found,) = (folder / "outputs" / "multirun").iterdir()
    jobs = sorted(path for path in found.iterdir() if path.is_dir())
    settings = [OmegaConf.load(job / "config.yaml") for job in jobs]
    assert [(bool(cfg.objective.shortcut), cfg.seed) for cfg in settings] == [
        (True, 0),
        (True, 1),
        (False, 0),
        (False, 1),
    ]
