"""What a user sees of a program: folders, exit codes, and one sentence for what went wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def folder_of(done):
    return next(line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("FOLDER"))


def test_runs_in_a_folder_named_after_the_command(toy):
    first = toy("seed=1", "backbone.depth=3")
    again = toy("backbone.depth=3", "seed=1")
    other = toy("seed=2")
    named = toy("seed=2", "name=mine")
    assert first.returncode == 0 and "NET 3 8 0.5" in first.stdout, first
    assert folder_of(first) == folder_of(again) != folder_of(other)
    assert folder_of(first).startswith(str(toy.folder / "outputs" / "toy" / "depth-3_seed-1_"))
    assert folder_of(named) == str(toy.folder / "outputs" / "toy" / "mine")
    assert folder_of(toy()) == str(toy.folder / "outputs" / "toy" / "default")


def test_a_sweep_can_be_put_anywhere(toy):
    done = toy("-m", "seed=0,1", "hydra.sweep.dir='my sweeps/a=1'")
    assert done.returncode == 0, done
    assert f"FOLDER {toy.folder}/my sweeps/a=1/0_seed-0\n" in done.stdout
    assert not (toy.folder / "outputs").exists()


def test_hydras_own_record_names_the_same_folder(toy):
    """Lightning reads it to start the other processes of a run, also where the folder has a name."""
    done = toy("seed=2", "name=mine")
    assert f"RUN_DIR {folder_of(done)}" in done.stdout.splitlines()


def test_sweep_gives_each_job_its_own_folder_and_the_same_again(toy):
    done = toy("-m", "seed=0,1", "objective/shortcut=consistency,other")
    assert done.returncode == 0, done
    folders = [line for line in done.stdout.splitlines() if line.startswith("FOLDER")]
    assert len(set(folders)) == 4
    sweeps = {Path(line.split(" ", 1)[1]).parent for line in folders}
    assert len(sweeps) == 1
    sweep = sweeps.pop()
    assert sweep.parent == toy.folder / "outputs" / "multirun" and sweep.name.startswith("toy_")
    assert (sweep / "multirun.yaml").is_file() and list(sweep.parent.iterdir()) == [sweep]
    assert done.stdout.count("NET 2 8 1.0") == 2
    again = toy("-m", "seed=0,1", "objective/shortcut=consistency,other")
    assert folders == [line for line in again.stdout.splitlines() if line.startswith("FOLDER")]
    assert (toy.folder / folders[0].split(" ", 1)[1] / ".hydra" / "config.yaml").is_file()


# What tests/integration/test_bad_input.py finds in this process, or another case here.
AGAIN = [
    (["backbone=zebra"], ["Unknown option 'zebra' for backbone: choose one of", "small"]),
    (["objective/shortcut=toy"], ["Unknown option 'toy' for objective/shortcut", "consistency, other"]),
    (["trainer.max_stepz=1"], ["Unknown key 'trainer.max_stepz': did you mean trainer.max_steps?"]),
    (["trainer.zebra=1"], ["Unknown key 'trainer.zebra': trainer has the keys max_steps, precision."]),
    (["seed=[1"], ["Cannot read the argument 'seed=[1'"]),
    (["backbone=broken"], ["backbone._target_ names nowhere.to.be.Found, which cannot be imported", "nowhere"]),
    (["+backbone.heads=2"], ["Unknown setting backbone.heads: Net has no argument heads"]),
]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in AGAIN),
        (["fail=config"], ["batch_size=0 is too small: choose at least 1."]),
        (["backbone=smal"], ["Unknown option 'smal' for backbone", "did you mean small?", "large"]),
        (["max_steps=1"], ["Unknown key 'max_steps': did you mean trainer.max_steps?"]),
        (["backbon=small"], ["Unknown key 'backbon': did you mean backbone?"]),
        (["zebra=1"], ["Unknown key 'zebra'", "+zebra="]),
        (["~trainer.zebra"], ["Unknown key 'trainer.zebra'"]),
        (["seed"], ["Cannot read the argument 'seed': write key=value"]),
        (["seed=1,2"], ["-m"]),
        (["needs_checkpoint=true"], ["A value for checkpoint is required: add checkpoint=... to the command."]),
        (["backbone=large"], ["refers to data.channels, which does not exist", "+data.channels=..."]),
        (["backbone=short"], ["backbone lacks 'width', which Net requires"]),
        (["backbone.depth=-1"], ["backbone.depth=-1 is negative: choose a depth of at least 1."]),
        (["fail=disk"], ["Cannot use ", "program.log/below (not a directory)", "hydra.run.dir=FOLDER"]),
        (["fail=ranks"], ["Cannot use the output folder ", "outputs/toy/fail-ranks", "(no space left on device)"]),
        (["-m", "fail=config", "seed=0,1"], ["batch_size=0 is too small"]),
        (["-cn", "nothing"], ["nothing"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[-1] else None,
)
def test_user_errors_are_one_sentence(toy, arguments, parts):
    if arguments[0] == "-m":  # Hydra announces the jobs and names the failed one; the sentence is the last line
        done = toy(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        sentence = done.stderr.strip().splitlines()[-1]
    else:
        sentence = toy.sentence(*arguments)
    for part in parts:
        assert part in sentence
    assert sentence.endswith((".", "?"))


def test_output_folder_that_cannot_be_made(toy):
    (toy.folder / "outputs").write_text("a file in the way")
    sentence = toy.sentence()
    assert sentence.startswith("Cannot use ") and "hydra.run.dir=FOLDER" in sentence


@pytest.mark.parametrize("arguments", [["backbone=smal", "debug=true"]])
def test_debug_shows_the_traceback(toy, arguments):
    done = toy(*arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["fail=config"]])
def test_hydra_full_error_shows_the_traceback(toy, arguments):
    done = toy(*arguments, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["fail=bug"], ["backbone=defect"]])
def test_a_defect_keeps_its_traceback(toy, arguments):
    done = toy(*arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "program.py" in done.stderr


def test_child_processes_see_the_users_own_setting(toy):
    assert "FULL_ERROR None" in toy().stdout
    assert "FULL_ERROR 0" in toy(HYDRA_FULL_ERROR="0").stdout


@pytest.mark.parametrize(
    "fail, code, name",
    [
        ("interrupt", 130, "Ctrl-C"),
        ("SIGINT", 130, "Ctrl-C"),
        ("SIGTERM", 143, "SIGTERM"),
        ("SIGHUP", 129, "SIGHUP"),
    ],
)
def test_being_stopped_is_one_sentence(toy, fail, code, name):
    done = toy(f"fail={fail}")
    assert done.returncode == code
    assert done.stderr == f"Stopped by {name}.\n"


def test_the_job_of_a_sweep_that_is_stopped_is_the_last(toy):
    done = toy("-m", "fail=SIGTERM", "seed=0,1")
    assert done.returncode == 143 and done.stdout.count("FOLDER") == 1
    assert done.stderr == "Stopped by SIGTERM.\n"


def test_what_is_ignored_stays_ignored(toy):
    """As under nohup."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, sys.executable, "program.py", "fail=SIGHUP", "pause=0.1"]
    done = toy.run(words)
    assert done.returncode == 0 and "NET" in done.stdout


def test_memory_on_a_gpu_grows_in_place_unless_the_user_says_how(toy):
    said = "expandable_segments:True"
    assert f"ALLOCATOR None {said}" in toy().stdout
    own = "max_split_size_mb:64"
    assert f"ALLOCATOR None {own}" in toy(PYTORCH_CUDA_ALLOC_CONF=own).stdout
    assert f"ALLOCATOR {own} None" in toy(PYTORCH_ALLOC_CONF=own).stdout
