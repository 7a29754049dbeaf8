"""What was used is what is recorded: over resumes, over other programs in the folder, over other files' weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowanchor.reporting.runs import find_runs
from flowanchor.run_lock import LOCK, RunLock

RUN = [
    "objective=flow_matching", "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2",
    "data.batch_size=32", "callbacks=default", "~callbacks.sample_grid", "~callbacks.best",
    "trainer.limit_val_batches=0", "log_every_n_steps=1", "ema.snapshot_every=null",
]  # fmt: skip


def content(folder, name):
    return torch.load(folder / "outputs" / "train" / name / "checkpoints" / "last.ckpt", weights_only=True)


def refused(command, capsys, *words, program="train"):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(program, *words)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("Error: ") and said.count("\n") == 1, said
    return said


def state(folder):
    """Every file of a run but its log."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".log"}


def test_new_optimizer_settings_are_used_told_and_recorded(command, capfd):
    new = ["optimizer.lr=1e-5", "optimizer.betas=[0.5,0.6]", "optimizer.weight_decay=0.5", "optimizer.eps=1e-4"]
    folder = command("train", *RUN, "trainer.max_steps=2", "name=lr")
    first = content(folder, "lr")["flowanchor"]
    capfd.readouterr()
    command("train", *RUN, "trainer.max_steps=4", "name=lr", *new)
    said = "".join(capfd.readouterr())
    assert "from step 2 with changed settings: " in said and "optimizer.lr=1e-05 (was 0.001)" in said
    after = content(folder, "lr")
    (group,) = after["optimizer_states"][0]["param_groups"]
    assert (group["lr"], list(group["betas"]), group["weight_decay"], group["eps"]) == (1e-5, [0.5, 0.6], 0.5, 1e-4)
    assert after["optimizer_states"][0]["state"][0]["step"] == 4
    (change,) = after["flowanchor"]["history"]
    assert change["step"] == 2 and change["changed"]["optimizer.lr"] == {"was": 1e-3, "is": 1e-5}
    assert after["flowanchor"]["run"] == first["run"] and after["flowanchor"]["config"]["optimizer"]["lr"] == 1e-5
    record = json.loads((folder / "outputs/train/lr/provenance.json").read_text())
    assert record["step"] == 0 and "optimizer.lr=1e-5" not in record["command"]
    (part,) = record["resumed"]
    assert part["step"] == 2 and part["changed"] == change["changed"] and "optimizer.lr=1e-5" in part["overrides"]

    # A file of before: its settings say what was typed, its groups what was used.
    del after["flowanchor"]["run"]
    group["lr"] = 1e-2
    torch.save(after, folder / "outputs/train/lr/checkpoints/last.ckpt")
    command("train", *RUN, "trainer.max_steps=5", "name=lr", *new)
    assert "optimizer.lr=1e-05 (was 0.01)" in "".join(capfd.readouterr())
    assert content(folder, "lr")["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-5


def test_what_trains_nothing_rewrites_nothing(command, capsys):
    """A finished run, one whose resume is refused or fails, a trial; a real resume does."""
    words = [*RUN, "name=kept", "ema.snapshot_every=1"]
    folder = command("train", *words, "trainer.max_steps=2")
    run = folder / "outputs/train/kept"
    assert yaml.safe_load((run / ".hydra/overrides.yaml").read_text())[-1] == "trainer.max_steps=2"
    before = state(run)
    command("train", *words, "trainer.max_steps=2", "optimizer.lr=7", "trainer.precision=64-true")
    assert state(run) == before
    assert "optimizer._target_" in refused(
        command, capsys, *words, "trainer.max_steps=4", "optimizer._target_=torch.optim.NAdam"
    )
    assert "not power_0.1" in refused(command, capsys, *words, "trainer.max_steps=4", "ema.sigma_rel=[0.1]")
    assert "initialise_from=x has no effect on a run that goes on" in refused(
        command, capsys, *words, "trainer.max_steps=4", "initialise_from=x"
    )
    assert state(run) == before
    command("train", *words, "trainer.fast_dev_run=true")
    trial = run / "fast_dev_run"
    assert {path: found for path, found in state(run).items() if path.parts[0] != trial.name} == before
    command("train", *words, "trainer.max_steps=3")
    assert state(run) != before


def test_programs_that_use_a_run_leave_its_record(command):
    folder = command("train", *RUN, "trainer.max_steps=2", "name=used", "seed=3", "optimizer.lr=2e-3")
    run = folder / "outputs/train/used"
    before = state(run)
    command("sample", f"checkpoint={run}", "num_samples=4", "sampler.steps=1", f"hydra.run.dir={run}")
    command(
        "evaluate", f"checkpoint={run}", "nfe=1", "num_samples=20", "metric=random", "metric.cache_dir=cache",
        f"hydra.run.dir={run}",
    )  # fmt: skip
    after = state(run)
    assert {path: after[path] for path in before} == before
    for program in ("sample", "eval"):
        record = json.loads((run / f"{program}.provenance.json").read_text())
        assert record["used"]["step"] == 2 and len(record["used"]["hash"]) == 12
        assert (run / f"{program}.config.yaml").is_file()
    (found,) = find_runs([folder / "outputs"])
    assert found.seed == 3 and "optimizer.lr=2e-3" in found.overrides
    command("train", *RUN, "trainer.max_steps=3", "name=used", "seed=3", "optimizer.lr=2e-3")
    assert content(folder, "used")["global_step"] == 3


def test_an_average_made_afterwards_is_that_of_its_checkpoint(command, capsys):
    words = [*RUN, "name=ph", "optimizer.lr=1e-2"]
    folder = command("train", *words, "trainer.max_steps=8", "ema.snapshot_every=2")
    run = folder / "outputs/train/ph"
    kept = run / "checkpoints/eight.ckpt"
    shutil.copy(run / "checkpoints/last.ckpt", kept)

    def average(checkpoint, output):
        command("convert", f"checkpoint={checkpoint}", f"output={output}.safetensors", "ema_profile=posthoc:0.1")
        return load_file(folder / f"{output}.safetensors")

    alone = average(run, "alone")
    command("train", *words, "trainer.max_steps=12", "ema.snapshot_every=6")
    again, later = average(kept, "again"), average(run, "later")
    assert all(torch.equal(again[name], alone[name]) for name in alone)
    assert max(float((again[name] - later[name]).abs().max()) for name in later) > 1e-3

    other = folder / "elsewhere/checkpoints/copy.ckpt"  # two folders below snapshots of another run
    other.parent.mkdir(parents=True)
    shutil.copy(kept, other)
    command("train", *RUN, "trainer.max_steps=8", "seed=1", "ema.snapshot_every=2", "hydra.run.dir=elsewhere")
    words = [f"checkpoint={other}", "output=no.safetensors", "ema_profile=posthoc:0.1"]
    assert "are those of another run" in refused(command, capsys, *words, program="convert")
    for path in (run / "ema_snapshots").glob("0000000[2468]_*"):
        path.unlink()
    words[0] = f"checkpoint={kept}"
    assert "is of step 12, after step 8" in refused(command, capsys, *words, program="convert")


def test_a_teacher_is_known_by_what_it_holds(command, capsys):
    teacher = [*RUN, "name=teacher"]
    folder = command("train", *teacher, "trainer.max_steps=2")
    student = [
        *[word.replace("objective=flow_matching", "objective=facm") for word in RUN], "teacher=checkpoint",
        "name=student", "initialise_from=${teacher.checkpoint}",
    ]  # fmt: skip
    typed, absolute = (
        f"teacher.checkpoint={path}" for path in ("outputs/train/teacher", folder / "outputs/train/teacher")
    )
    command("train", *student, typed, "trainer.max_steps=2")
    recorded = content(folder, "student")["flowanchor"]["sources"]["teacher.checkpoint"]
    assert recorded["path"].startswith(str(folder)) and len(recorded["digest"]) == 64
    command("train", *student, absolute, "trainer.max_steps=3")
    assert content(folder, "student")["flowanchor"]["sources"]["teacher.checkpoint"] == recorded

    shutil.copytree(folder / "outputs/train/teacher", folder / "outputs/train/other")
    command("train", *teacher, "trainer.max_steps=3")
    said = refused(command, capsys, *student, absolute, "trainer.max_steps=4")
    assert recorded["digest"][:12] in said and "holds other weights" in said and "name=NAME" in said
    # The weights are still somewhere, and what it started from counts no more.
    command("train", *student, "teacher.checkpoint=outputs/train/other", "trainer.max_steps=4")
    assert content(folder, "student")["global_step"] == 4
    said = refused(command, capsys, *student, absolute, "initialise_from=null", "trainer.max_steps=5")
    assert "initialise_from=null has no effect" in said


def test_one_process_trains_in_a_folder(command, capsys):
    folder = command("train", *RUN, "trainer.max_steps=2", "name=locked")
    run = folder / "outputs/train/locked"
    assert not (run / LOCK).exists()
    other = RunLock(run)
    other.take()
    before = state(run)
    said = refused(command, capsys, *RUN, "trainer.max_steps=4", "name=locked")
    assert f"Another process trains in {run}" in said and str(other.me.pid) in said and other.me.since in said
    assert state(run) == before
    other.release()
    command("train", *RUN, "trainer.max_steps=4", "name=locked")
    assert content(folder, "locked")["global_step"] == 4 and not (run / LOCK).exists()


def test_a_limit_that_cuts_a_step_in_two(command, capsys):
    words = [*RUN, "trainer.max_steps=2", "trainer.accumulate_grad_batches=3", "trainer.limit_train_batches=4"]
    said = refused(command, capsys, *words, "global_batch_size=96", "name=cut")
    assert "An epoch has 4 batches, no multiple of trainer.accumulate_grad_batches=3" in said
    folder = command("train", *words[:-1], "data.batch_size=500", "data.repeat=1", "name=whole")  # two batches an epoch
    batches = content(folder, "whole")["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    assert batches == 6
