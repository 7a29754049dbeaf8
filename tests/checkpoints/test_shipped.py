"""The models that come with the package: they open by name, are small, and draw what they say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import flowanchor
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.shipped import FOLDER, shipped_names
from flowanchor.errors import CheckpointError


@pytest.fixture(scope="module")
def judge():
    """Tells digits apart, by scikit-learn alone."""
    real = load_digits()
    return KNeighborsClassifier(3).fit(np.round(real.data / 16 * 255), real.target)


def test_their_names():
    assert {"digits", "digits_teacher"} <= set(shipped_names())


@pytest.mark.parametrize(("name", "steps"), [("digits", 1), ("digits", 2), ("digits_teacher", 20)])
def test_they_draw_the_digit_that_is_asked_for(judge, name, steps):
    labels = np.arange(200) % 10
    images = flowanchor.load(name).sample(torch.from_numpy(labels), steps=steps, seed=1)
    assert images.shape == (200, 8, 8, 1)
    right = judge.predict(images.reshape(200, 64).numpy()) == labels
    assert right.mean() > 0.9
    assert len(np.unique(images.numpy(), axis=0)) > 190


@pytest.mark.parametrize("name", shipped_names())
def test_they_are_small_and_say_what_was_measured(name):
    folder = FOLDER / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_400_000 * (4 if "emoji" in name else 1)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "metrics.json", "model.safetensors"}
    card = (folder / "README.md").read_text()
    assert f'flowanchor.load("{name}")' in card and re.search(r"Commit [0-9a-f]{12}, seed \d+", card)
    report = json.loads((folder / "metrics.json").read_text())
    assert len(report["results"]) > 2
    for line in report["results"]:
        assert re.search(rf"\| {line['nfe']} \| {line['fd']:.4g} \|", card), line


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("digits") == FOLDER / "digits" / "model.safetensors"
    (tmp_path / "digits").mkdir()
    with pytest.raises(CheckpointError, match=r"The folder digits holds no checkpoints/last\.ckpt"):
        find_checkpoint("digits")
    for path in ("./nowhere/digits", tmp_path / "elsewhere" / "digits"):
        with pytest.raises(CheckpointError, match="There is no checkpoint at"):
            find_checkpoint(path)


def test_a_name_that_is_not_known_gets_the_names_that_are():
    with pytest.raises(CheckpointError, match="a model that comes along.*digits, digits_teacher"):
        flowanchor.load("digit")
    with pytest.raises(CheckpointError) as told:
        flowanchor.load("nowhere.ckpt")
    assert "comes along" not in str(told.value)
