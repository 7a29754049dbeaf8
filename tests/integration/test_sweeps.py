"""Sweeps as users type them: a search for settings, and jobs as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TRAIN = Path(__file__).parents[2] / "src" / "train.py"
SMALL = [
    "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=32", "ema=none",
    "trainer.max_steps=2", "trainer.limit_val_batches=0", "~callbacks.sample_grid", "~callbacks.best", "logger=none",
]  # fmt: skip


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLOWANCHOR_CACHE": str(folder / "cache")}
    command = [sys.executable, str(TRAIN), *words, *SMALL]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_a_search_minimises_the_distance_at_two_steps(tmp_path):
    done = train(tmp_path, "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "score.num_samples=60",
                 "hydra.sweep.dir=search")  # fmt: skip
    assert done.returncode == 0, done.stderr
    best = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    assert set(best["best_params"]) == {"optimizer.lr", "objective.shortcut.relaxation_exponent"}
    reports = [json.loads(path.read_text()) for path in (tmp_path / "search").glob("*/score/metrics.json")]
    assert len(reports) == 2 and all([row["nfe"] for row in report["results"]] == [2] for report in reports)
    assert best["best_value"] == pytest.approx(min(report["results"][0]["fd"] for report in reports))


def test_jobs_as_processes_of_this_machine(tmp_path):
    done = train(tmp_path, "-m", "launcher=submitit_local", "seed=0,1", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "sweep").glob("*/checkpoints/last.ckpt"))) == 2
    assert list((tmp_path / "sweep" / ".submitit").iterdir()), "submitit ran them"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["score=2"], "Error: score= is one number for a sweep: write score.nfe=2"),
        (["score={nfe: 2}", "trainer.devices=2"], "Error: score= is measured by the process that trained"),
        (["-m", "optimizer.lrr=1,2"], "optimizer.lr"),
    ],
)
def test_mistakes(tmp_path, words, sentence):
    done = train(tmp_path, *words)
    assert done.returncode == 1 and sentence in done.stderr, done.stderr
