"""Sweeps as users type them: a search for settings, and jobs as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module

from flowanchor.programs.launch import prepare

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
    space = "search={objective.shortcut.relaxation_exponent: 'interval(0.25, 1.0)'}"  # in the place of the usual one
    done = train(tmp_path, "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "score.num_samples=60",
                 "+score.metric.steps=5", "hydra.sweep.dir=search", space)  # fmt: skip
    assert done.returncode == 0, done.stderr
    best = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    assert set(best["best_params"]) == {"objective.shortcut.relaxation_exponent"}
    assert all("_relaxation_exponent-" in path.parent.name for path in (tmp_path / "search").glob("*/config.yaml"))
    reports = [json.loads(path.read_text()) for path in (tmp_path / "search").glob("*/score/metrics.json")]
    assert len(reports) == 2 and all([row["nfe"] for row in report["results"]] == [2] for report in reports)
    assert best["best_value"] == pytest.approx(min(report["results"][0]["fd"] for report in reports))


@pytest.mark.slow
@pytest.mark.cold  # submitit knows a job by the id of the process that it has started
@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_jobs_as_processes_of_this_machine(command, seeds):
    words = ["launcher=submitit_local", f"seed={','.join(map(str, seeds))}", "hydra.sweep.dir=sweep", *SMALL]
    folder = command("train", "-m", *words) / "sweep"
    kept = [yaml.safe_load(path.read_text())["seed"] for path in folder.glob("*/config.yaml")]
    assert sorted(kept) == seeds and len(list(folder.glob("*/checkpoints/last.ckpt"))) == len(seeds)
    assert list((folder / ".submitit").iterdir()), "submitit ran them"


def test_the_usual_search_fits_every_objective():
    prepare()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        cfg = compose("train", ["hparams_search=optuna", "objective=flow_matching"], return_hydra_config=True)
    assert set(cfg.hydra.sweeper.params) == {"optimizer.lr"}


def test_a_job_that_fails_is_told_at_once_and_in_its_log(tmp_path):
    done = train(tmp_path, "-m", "optimizer.lr=-1,1e-3,-2", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if line.startswith("Job ") and "refuses its settings" in line]
    assert [line.split()[1] for line in told] == ["0", "2"]
    assert done.stdout.index(told[0]) < done.stdout.index("Trained for") < done.stdout.index(told[1])
    logs = {path.parent.name: path.read_text() for path in (tmp_path / "sweep").glob("*/train.log")}
    assert sorted(logs) == ["0_lr-1", "1_lr-0.001", "2_lr-2"]
    assert "refuses its settings" in logs["0_lr-1"] and "Trained for" in logs["1_lr-0.001"]


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
