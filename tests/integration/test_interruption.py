"""A training that is told to stop saves at the end of a step, says so, and goes on from there as if it had not been."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from flowanchor.checkpoints.sharded import read_whole
from flowanchor.programs.train import main

_spec = importlib.util.spec_from_file_location("kicking", Path(__file__).with_name("kicking.py"))
assert _spec is not None and _spec.loader is not None
kicking = sys.modules["kicking"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kicking)
kick = kicking.kick

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
RUN = [
    "callbacks=default", "~callbacks.best", "optimizer.lr=1e-2", "trainer.val_check_interval=3", "log_every_n_steps=1",
    "trainer.limit_val_batches=2", "data.repeat=1", "data.batch_size=100", "objective=flow_matching", "sampler.steps=1",
    "callbacks.sample_grid.every_n_steps=2", "callbacks.sample_grid.nfe=[1]", "callbacks.sample_grid.per_class=1",
]  # fmt: skip


def content(folder: Path, name: str) -> dict:
    return torch.load(folder / "outputs" / "train" / name / "checkpoints" / "last.ckpt", weights_only=True)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "outputs" / "train" / name / "csv" / "metrics.csv").open(newline="") as lines:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(lines)]


def stopped(command, *words: str) -> int:
    before = {number: signal.getsignal(number) for number in CODES}
    with pytest.raises(SystemExit) as exit:
        command(*words)
    assert {number: signal.getsignal(number) for number in CODES} == before, "the handlers were not restored"
    return exit.value.code


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted run named whole; of the same settings, the same one."""
    made: dict[tuple[str, ...], Path] = {}

    def run(settings: list[str]) -> Path:
        key = tuple(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(made[key])
                patch.setattr(sys, "argv", ["src/train.py", *settings, "name=whole"])
                GlobalHydra.instance().clear()
                main()
        return made[key]

    return run


PLACES = [  # hook at which the signal comes, steps done by then, step that is saved, other settings
    (signal.SIGTERM, "on_before_backward", 3, 4, []),  # in the middle of a step
    (signal.SIGINT, "on_before_optimizer_step", 1, 2, []),  # of one after which a grid is drawn
    (signal.SIGHUP, "on_train_batch_start", 2, 3, []),  # of one after which a validation falls due
    (signal.SIGTERM, "on_validation_batch_start", 3, 3, []),  # with the averages in the place of the weights
    (signal.SIGTERM, "on_validation_start", 6, 6, []),
    # of the last one of an epoch
    (signal.SIGTERM, "on_train_batch_start", 4, 5, ["data.batch_size=250", "trainer.max_steps=6"]),
    (
        signal.SIGINT, "on_train_batch_start", 2, 3,
        ["trainer.accumulate_grad_batches=2", "data.num_workers=1", "trainer.max_steps=5"],
    ),
    (signal.SIGTERM, "on_train_batch_start", 7, 8, []),  # of the last one of all
]  # fmt: skip


@pytest.mark.parametrize("signum, hook, at, saved, extra", PLACES)
def test_goes_on_as_if_it_had_not_been_stopped(
    command, tiny, capfd, uninterrupted, assert_same, signum, hook, at, saved, extra
):  # fmt: skip
    steps = [] if any("max_steps" in word for word in extra) else ["trainer.max_steps=8"]
    settings = [*tiny, *RUN, *steps, *extra]
    folder, whole = Path.cwd(), uninterrupted(settings)
    capfd.readouterr()
    assert stopped(command, "train", *settings, "name=parts", *kick(hook, at, signum)) == CODES[signum]
    told = capfd.readouterr().err
    name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
    run = folder / "outputs" / "train" / "parts"
    assert f"Stopped by {name} at step {saved}: saved in {run}, and the same command goes on from there.\n" in told
    assert "Traceback" not in told and "KeyboardInterrupt" not in told and told.count("Stopped by") == 1
    assert content(folder, "parts")["global_step"] == saved
    command("train", *settings, "name=parts")
    ours, theirs = content(folder, "parts"), content(whole, "whole")
    for key in ("global_step", "state_dict", "ema", "optimizer_states"):
        assert_same(ours[key], theirs[key], key)
    assert rows(folder, "parts") == rows(whole, "whole")
    assert {p.name for p in (run / "samples").iterdir()} == {
        p.name for p in (whole / "outputs/train/whole/samples").iterdir()
    }


def test_a_signal_in_the_validation_that_a_resumed_run_makes_first(command, tiny, capfd, assert_same):
    settings = [*tiny, *RUN, "trainer.max_steps=4", "name=one"]
    stopped(command, "train", *settings, *kick("on_train_batch_start", 2, signal.SIGTERM))
    before = content(Path.cwd(), "one")
    assert stopped(command, "train", *settings, *kick("on_validation_batch_start", 3, signal.SIGTERM)) == 143
    assert "at step 3: no step has been made since " in capfd.readouterr().err
    assert_same(content(Path.cwd(), "one")["loops"], before["loops"])
    command("train", *settings)
    assert content(Path.cwd(), "one")["global_step"] == 4


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start"])
def test_before_the_first_step_there_is_nothing_to_save(command, tiny, capfd, hook):
    words = [*tiny, *RUN, "name=one", "trainer.num_sanity_val_steps=1", *kick(hook, 0, signal.SIGTERM)]
    assert stopped(command, "train", *words) == 143
    assert "Stopped by SIGTERM before its first step, so there is nothing to save.\n" in capfd.readouterr().err
    assert not (Path("outputs/train/one/checkpoints") / "last.ckpt").exists()


def test_without_callbacks_nothing_is_saved(command, tiny, capfd):
    words = [*tiny, "name=one", "objective=flow_matching", *kick("on_train_batch_start", 2, signal.SIGHUP)]
    assert stopped(command, "train", *words) == 129
    assert "Stopped by SIGHUP at step 3: nothing is saved in " in capfd.readouterr().err


def test_a_sweep_does_not_go_on_with_the_next_job(command, tiny, capfd):
    words = ["-m", *tiny, *RUN, "seed=0,1", "trainer.max_steps=8", "hydra.sweep.dir=sweep"]
    assert stopped(command, "train", *words, *kick("on_train_batch_start", 2, signal.SIGINT)) == 130
    assert [path.name.split("_")[0] for path in Path("sweep").glob("*_*")] == ["0"]
    assert capfd.readouterr().err.count("Stopped by Ctrl-C at step 3: saved in ") == 1


def test_a_trial_that_was_cut_off_has_no_score(command, tiny):
    run = [word for word in RUN if word != "objective=flow_matching"]  # the search is for a setting of facm
    words = ["-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", *tiny, *run, "score=null", "hydra.sweep.dir=s"]
    assert stopped(command, "train", *words, *kick("on_train_batch_start", 2, signal.SIGTERM)) == 143
    assert not Path("s/optimization_results.yaml").exists() and not list(Path("s").glob("1_*"))


# ------------------------------------------------------------------------------------------------------------- SLURM


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """The environment of a job, and a `scontrol` that writes down what it was asked for."""
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    job = "NTASKS=1 JOB_ID=77 JOB_NAME=train PROCID=0 LOCALID=0 NODEID=0 NODELIST=localhost"
    for entry in job.split():
        monkeypatch.setenv(*f"SLURM_{entry}".split("="))
    return tmp_path / "asked"


@pytest.mark.parametrize("array, asked", [({}, "requeue 77\n"), ({"JOB_ID": "5", "TASK_ID": "3"}, "requeue 5_3\n")])
def test_slurms_notice_saves_and_requeues(command, tiny, capfd, slurm, monkeypatch, array, asked):
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    settings = [*tiny, *RUN, "trainer.max_steps=8", "name=one"]
    assert stopped(command, "train", *settings, *kick("on_before_backward", 4, signal.SIGUSR1)) == 128 + signal.SIGUSR1
    assert slurm.read_text() == asked
    told = capfd.readouterr().err
    assert "Stopped by SIGUSR1 at step 5: saved in " in told and f"SLURM starts job {asked.split()[1]} again.\n" in told
    assert content(Path.cwd(), "one")["global_step"] == 5
    if not array:
        command("train", *settings)
        assert " from step 5" in capfd.readouterr().out
    assert not list(Path("outputs").rglob("hpc_ckpt_*"))


def test_a_requeue_that_fails_is_told(command, tiny, capfd, slurm):
    (slurm.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    stopped(command, "train", *tiny, *RUN, "name=one", *kick("on_before_backward", 4, signal.SIGUSR1))
    assert "but scontrol could not requeue job 77 (no such job): submit it again.\n" in capfd.readouterr().err


def test_submitits_own_way_of_requeueing_comes_after_the_checkpoint(command, tiny, slurm, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    found = []
    before = signal.signal(signal.SIGUSR2, lambda *_: found.append(content(Path.cwd(), "one")["global_step"]))
    try:
        stopped(command, "train", *tiny, *RUN, "name=one", *kick("on_before_backward", 4, signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert found == [5] and not slurm.exists()


def test_a_checkpoint_of_an_earlier_version_is_named_and_not_read(command, tiny, slurm, assert_same):
    settings = [*tiny, *RUN, "trainer.max_steps=2"]
    folder = command("train", *settings, "name=other", "seed=5")
    run = folder / "outputs/train/one"
    run.mkdir()
    (folder / "outputs/train/other/checkpoints/last.ckpt").rename(run / "hpc_ckpt_1.ckpt")
    with pytest.warns(UserWarning, match="hpc_ckpt_1.ckpt was written by an earlier version .* is not read: delete it"):
        command("train", *settings, "name=one")
    command("train", *settings, "name=two")
    assert_same(content(folder, "one")["state_dict"], content(folder, "two")["state_dict"])


# ------------------------------------------------------------------------------------------------- several processes

DDP, FSDP = ["strategy=ddp"], ["strategy=fsdp_chain_jvp"]
TWO = [
    "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", *RUN, "~callbacks.sample_grid",
    "data.batch_size=50", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=6", "optimizer.fused=true",
]  # fmt: skip
TWO = [word for word in TWO if not word.startswith("callbacks.sample_grid.")]
ALONE, UNWATCHED = ["trainer.devices=1", "data.batch_size=100"], ["~callbacks.rank_watchdog"]
TOGETHER = {  # strategy, what happens, exit code, steps at which it may stop, settings
    "one": (ALONE, [], 0, (), []),
    "ddp": (DDP, [], 0, (), []),
    "fsdp": (FSDP, [], 0, (), []),
    "lone": (DDP, kick("on_before_backward", 3, signal.SIGTERM, rank=1), 143, (4, 5), []),
    "all": (FSDP, kick("on_before_backward", 3, signal.SIGINT, group=True), 130, (4, 5), []),
    "validating": (FSDP, kick("on_validation_batch_start", 3, signal.SIGHUP, rank=1), 129, (3,), []),
    "workers": (ALONE, kick("on_before_backward", 3, signal.SIGTERM, group=True), 143, (4,), ["data.num_workers=1"]),
    "unwatched": (DDP, kick("on_before_backward", 3, signal.SIGTERM, rank=1), 143, (4,), UNWATCHED),
    "twice": (DDP, kick("on_before_backward", 3, signal.SIGTERM, signal.SIGTERM, rank=1, pause=2.5), 143, (), []),
    "early": (DDP, kick("on_fit_start", 0, signal.SIGTERM, rank=1), 143, (), []),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    scenarios = []
    for name, (strategy, event, code, _, extra) in TOGETHER.items():
        words = [*TWO, *strategy, *extra, f"name={name}"]
        resumes = code and name not in ("twice", "early")
        processes = 1 if strategy is ALONE else 2
        scenarios.append(
            {"name": name, "processes": processes, "parts": [[*words, *event], *([words] if resumes else [])]}
        )
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(here / "kicking.py"), str(folder), json.dumps(scenarios)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def state(folder: Path, name: str) -> dict:
    path = folder / "outputs" / "train" / name / "checkpoints" / "last.ckpt"
    return read_whole(path) if path.is_dir() else torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", [name for name, scenario in TOGETHER.items() if scenario[3]])
def test_all_ranks_stop_at_one_step(together, name, assert_same):
    folder, codes = together
    strategy, _, code, steps, _ = TOGETHER[name]
    whole = {id(ALONE): "one", id(DDP): "ddp", id(FSDP): "fsdp"}[id(strategy)]
    told = [(folder / f"{name}_0_{rank}").read_text() for rank in range(1 if strategy is ALONE else 2)]
    assert codes[name] == [[code] * len(told), [0] * len(told)], told
    assert any(f" at step {step}: saved in {folder}/outputs/train/{name}, " in told[0] for step in steps), told
    assert sum(text.count("Stopped by") for text in told) == 1, told
    assert not any("Traceback" in text or "died" in text for text in told)
    theirs, ours = state(folder, whole), state(folder, name)
    for key in ("global_step", "state_dict", "ema", "optimizer_states"):
        assert_same(ours[key], theirs[key], key)
    assert rows(folder, name) == rows(folder, whole)


def test_processes_that_lightning_started_end_together(tmp_path):
    """The one that is told ends first, and Lightning ends the others with SIGKILL where it sees that."""
    here = Path(__file__).parent
    words = [*TWO, *DDP, "name=one", *kick("on_before_backward", 3, signal.SIGHUP, rank=1)]
    paths = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(here.parents[1] / "src" / "train.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    # A process that stays behind keeps the pipe open, and this times out.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 129, done.stderr
    assert done.stderr.count("Stopped by SIGHUP at step ") == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "outputs/train/one/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("twice", "SIGTERM came again, so the program ends at once, without saving.\n"),
        ("early", "Stopped by SIGTERM before its first step, so there is nothing to save.\n"),
    ],
)
def test_all_ranks_end_at_once(together, name, sentence):
    folder, codes = together
    told = [(folder / f"{name}_0_{rank}").read_text() for rank in (0, 1)]
    assert codes[name] == [[143, 143]] and sentence in told[0] and "died" not in told[0], told
    assert not (folder / "outputs/train" / name / "checkpoints/last.ckpt").exists()
