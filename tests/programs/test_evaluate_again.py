"""An evaluation that is killed, run again, and run by two processes gives the numbers of an undisturbed one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from flowanchor.metrics.evaluator import Evaluator
from flowanchor.programs.evaluate import evaluate
from flowanchor.programs.launch import prepare

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("no_plot")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

_spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    _module.save_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
    return folder


def settings(place, *overrides):
    own = ["sampler=flow", "metric=random", f"metric.cache_dir={place / 'cache'}", "metric.feature_limit=200"]
    return [f"checkpoint={place / 'run'}", *own, "device=cpu", "batch_size=30", *overrides]


def config(place, *overrides):
    prepare()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        return compose("eval", settings(place, "num_samples=200", "nfe=[1,2]", "save_every=60", *overrides))


def numbers(report):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in report["results"]]


class Cut(Exception):
    pass


@pytest.fixture
def looked(monkeypatch):
    """Images that pass the extractor; `looked["stop"]` of them end the evaluation."""
    count = {"images": 0, "stop": None}
    look = Evaluator.look

    def counted(self, images, prompts=None):
        if count["stop"] is not None and count["images"] + len(images) > count["stop"]:
            raise Cut
        count["images"] += len(images)
        return look(self, images, prompts)

    monkeypatch.setattr(Evaluator, "look", counted)
    return count


def test_interrupted_and_run_again(place, looked):
    whole = evaluate(config(place, "save_samples=true"), place / "whole")
    real = looked["images"] - 2 * 200  # reference and floor
    looked["images"], looked["stop"] = 0, 200 + 200 + 130  # the floor, the first line, a part of the second
    with pytest.raises(Cut):
        evaluate(config(place, "save_samples=true"), place / "cut")
    looked["images"], looked["stop"] = 0, None
    report = evaluate(config(place, "save_samples=true"), place / "cut")
    assert numbers(report) == numbers(whole)
    assert looked["images"] == 200 + 200 - 120, "what was saved is not generated again"
    assert real == 200 + 1297
    for name in ("nfe1.npz", "nfe2.npz"):
        with np.load(place / "whole" / "samples" / name) as first, np.load(place / "cut" / "samples" / name) as second:
            assert np.array_equal(first["images"], second["images"])
    assert not list((place / "cut").rglob("*.images.npy"))


def test_finished_lines_are_kept_until_they_no_longer_hold(place, looked):
    first = evaluate(config(place), place / "kept")

    def generated(*overrides):
        looked["images"] = 0
        report = evaluate(config(place, *overrides), place / "kept")
        return report, looked["images"] - 200

    again, images = generated()
    assert images == 0 and again["results"] == first["results"]
    assert generated("nfe=[2,3]")[1] == 200  # one more line
    assert generated("restart=true")[1] == 2 * 200
    changed, images = generated("seed=1")
    assert images == 2 * 200 and changed["results"][0]["fd"] != first["results"][0]["fd"]
    assert generated("save_samples=true", "seed=1", "nfe=1")[1] == 200
    (place / "kept" / "samples" / "nfe1.npz").unlink()
    assert generated("save_samples=true", "seed=1", "nfe=1")[1] == 200  # its images are gone


def run(place, folder, *overrides, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "src" / "eval.py"), *settings(place, *overrides)]
    return subprocess.Popen(
        [*command, f"hydra.run.dir={folder}"], cwd=place, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def test_killed_and_run_again_by_two_processes(place):
    size = ("num_samples=800", "nfe=10", "save_every=30", "save_samples=true", "protocol=random")
    whole = run(place, "one", *size)
    killed = run(place, "two", *size)
    latest = time.monotonic() + 240
    while time.monotonic() < latest and not list((place / "two").glob(".evaluation/*/*/0.npz")):
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (place / "two" / "metrics.json").exists(), "it was killed too late to test anything"
    finish(whole)
    output = finish(run(place, "two", *size, launcher=TORCHRUN))
    assert "going on" in output and "1 of 2" in output and output.count("against digits") == 1
    one, two = (json.loads((place / name / "metrics.json").read_text()) for name in ("one", "two"))
    for first, second in zip(numbers(one), numbers(two), strict=True):
        for key, value in first.items():
            assert second[key] == value or second[key] == pytest.approx(value, rel=1e-9), key
    with np.load(place / "one" / "samples" / "nfe10.npz") as a, np.load(place / "two" / "samples" / "nfe10.npz") as b:
        assert np.array_equal(a["images"], b["images"]) and np.array_equal(a["labels"], b["labels"])
    assert len(list((place / "two").rglob("*.npz"))) == 1  # the samples: no parts are left
