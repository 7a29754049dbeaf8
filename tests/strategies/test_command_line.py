"""`strategy=fsdp_chain_jvp` as users type it: Lightning's launcher, torchrun, resuming, sampling, mistakes."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowanchor.checkpoints import load_model, read_checkpoint
from flowanchor.checkpoints.sharded import is_sharded, read_whole

ROOT = Path(__file__).parents[2]
RUN = [
    "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "backbone.disable_label_dropout=true",
    "objective=flow_matching", "objective/interval=plain", "trainer.accelerator=cpu", "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1", "log_every_n_steps=1", "callbacks.sample_grid.every_n_steps=100",
    "callbacks.sample_grid.per_class=1", "sampler.steps=1", "callbacks.sample_grid.nfe=[1]", "optimizer.eps=0.1",
    "optimizer.fused=true",
]  # fmt: skip
SHARDED = ["strategy=fsdp_chain_jvp", "trainer.devices=2", "data.batch_size=16"]


def launch(folder: Path, *words: str, through_torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if through_torchrun else []
    command = [sys.executable, *launcher, str(ROOT / "src" / "train.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, started by Lightning and resumed under torchrun, and the same by one process."""
    folder = tmp_path_factory.mktemp("command_line")
    for words, elastic in (
        ([*SHARDED, "name=two", "trainer.max_steps=2"], False),
        ([*SHARDED, "name=two", "trainer.max_steps=4"], True),
        (["name=one", "trainer.max_steps=4", "data.batch_size=32"], False),
    ):
        done = launch(folder, *RUN, *words, through_torchrun=elastic)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "outputs" / "train"


def test_two_processes_train_what_one_does(folder):
    assert is_sharded(folder / "two/checkpoints/last.ckpt") and is_sharded(folder / "two/checkpoints/best.ckpt")
    two = read_whole(folder / "two/checkpoints/last.ckpt")
    one = torch.load(folder / "one/checkpoints/last.ckpt", weights_only=True)
    assert one["global_step"] == two["global_step"] == 4 and one["state_dict"].keys() == two["state_dict"].keys()
    for part, other in ((one["state_dict"], two["state_dict"]), *((one["ema"][p], two["ema"][p]) for p in one["ema"])):
        for name in part:
            torch.testing.assert_close(other[name], part[name], rtol=1e-5, atol=1e-6, msg=name)
    assert one["state_dict"]["student.final_layer.linear.weight"].abs().max() > 0


def test_a_resume_uses_the_new_settings_of_the_optimizer(folder):
    shutil.copytree(folder / "two", folder / "faster")
    done = launch(folder.parents[1], *RUN, *SHARDED, "name=faster", "trainer.max_steps=5", "optimizer.lr=1e-5")
    assert done.returncode == 0 and "optimizer.lr=1e-05 (was 0.001)" in done.stdout + done.stderr, done.stderr
    before, after = (read_whole(folder / name / "checkpoints/last.ckpt") for name in ("two", "faster"))
    (group,) = after["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 1e-5 and after["optimizer_states"][0]["state"][0]["step"] == 5
    for name in before["state_dict"]:  # Adam moves a weight by a rate and a bit at most
        assert (after["state_dict"][name] - before["state_dict"][name]).abs().max() <= 1e-4, name


def logged(run: Path) -> list[dict[str, str]]:
    with (run / "csv" / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_it_logs_draws_and_snapshots_as_any_run(folder):
    two, one = folder / "two", folder / "one"
    assert len([row for row in logged(two) if row["train/loss"]]) == 4
    norms = [[float(row["train/grad_norm"]) for row in logged(run) if row["train/grad_norm"]] for run in (two, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    losses = [[float(row["val/loss"]) for row in logged(run) if row["val/loss"]] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
    assert (two / "samples" / "step_00000004.png").is_file()
    assert "00000004_power_0.2.safetensors" in {path.name for path in (two / "ema_snapshots").iterdir()}


def test_the_run_folder_is_opened_by_one_process(folder):
    model = load_model(folder / "two")
    assert model.step == 4 and model.ema == "power_0.2"
    assert read_checkpoint(folder / "two")["flowanchor"]["kind"] == "flow"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["strategy.replicate=3"], "strategy.replicate=3 does not divide the 2 processes .*: choose one of 1, 2"),
        (["trainer.precision=16-mixed"], "precision=16-mixed does not work .*: use trainer.precision=32-true or"),
        (["trainer.precision=64-true"], "precision=64-true does not work"),
    ],
)
def test_mistakes_are_one_sentence_before_training(tmp_path, words, expected):
    done = launch(tmp_path, *RUN, *SHARDED, *words, "logger=none")
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(expected, sentence) and "Traceback" not in done.stderr
