"""Checkpoints are data: read without running anything, refused in one sentence where they do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from flowanchor.checkpoints import initialise_student, load_model, read_checkpoint
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.errors import CheckpointError
from flowanchor.generation.samplers import build_sampler
from flowanchor.plugins.backbones.lightningdit import LightningDiT

SIZES = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 3,
}
TARGET = "flowanchor.plugins.backbones.lightningdit.LightningDiT"
INTERVAL = {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}
SAMPLER = {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2, "grid": None}


def network(seed=0, **settings):
    torch.manual_seed(seed)
    made = LightningDiT(**{**SIZES, **settings})
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def write(path: Path, student=None, ema=None, backbone=None, **meta) -> Path:
    student = student or network()
    content = {
        "state_dict": {f"student.{key}": value for key, value in student.state_dict().items()},
        "flowanchor": {
            "format": 1,
            "kind": "shortcut",
            "step": 7,
            "config": {
                "backbone": backbone or {"_target_": TARGET, **SIZES},
                "objective": {"interval": INTERVAL},
                "sampler": SAMPLER,
            },
            **meta,
        },
    }
    if ema:
        content["ema"] = {name: average.state_dict() for name, average in ema.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_file_or_run_folder_and_which_weights(tmp_path):
    first, second = network(1), network(2)
    path = write(tmp_path / "run" / "checkpoints" / "last.ckpt", network(0), {"wide": first, "narrow": second})
    model = load_model(tmp_path / "run")
    assert model.ema == "wide" and same(model.backbone, first) and not model.backbone.training
    assert same(load_model(path, ema="narrow").backbone, second)
    assert same(load_model(path, ema="none").backbone, network(0))
    assert model.step == 7 and model.kind == "shortcut" and model.path == str(path)
    with pytest.raises(CheckpointError, match="no EMA profile 'median': choose one of wide, narrow, none"):
        load_model(path, ema="median")
    assert load_model(write(tmp_path / "raw.ckpt")).ema == "none"


def test_sampler_of_the_checkpoint_with_changes(tmp_path):
    model = load_model(write(tmp_path / "a.ckpt"))
    assert build_sampler({"steps": None}, model).nfe == 2
    assert build_sampler({"steps": 3}, model).nfe == 3
    assert (
        build_sampler({"_target_": "flowanchor.plugins.samplers.flow.FlowSampler", "steps": 5}, model).label
        == "flow-euler"
    )


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    trap = tmp_path / "sprung"
    for name, save in (
        ("torch.ckpt", torch.save),
        ("plain.ckpt", lambda content, path: path.write_bytes(pickle.dumps(content))),
    ):
        path = tmp_path / name
        save({"state_dict": {}, "flowanchor": Bomb(str(trap))}, path)
        with pytest.raises(CheckpointError, match="cannot be read safely|not a checkpoint that can be read safely"):
            read_checkpoint(path)
    assert not trap.exists()


def test_a_config_that_names_foreign_code_is_refused(tmp_path):
    path = write(tmp_path / "a.ckpt", backbone={"_target_": "os.system", "command": "true"})
    with pytest.raises(CheckpointError, match="asks for 'os.system'"):
        load_model(path)
    nested = {"_target_": TARGET, **SIZES, "mlp_ratio": {"_target_": "builtins.eval", "source": "4"}}
    with pytest.raises(CheckpointError, match="asks for 'builtins.eval'"):
        load_model(write(tmp_path / "b.ckpt", backbone=nested))


def test_files_that_are_no_checkpoints_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        load_model(tmp_path / "missing.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoints/last.ckpt"):
        find_checkpoint(tmp_path / "empty")
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot|not a checkpoint"):
        load_model(garbage)
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": network().state_dict()}, foreign)
    with pytest.raises(CheckpointError, match="was not written by flowanchor"):
        load_model(foreign)
    with pytest.raises(CheckpointError, match="checkpoint format 99"):
        load_model(write(tmp_path / "later.ckpt", format=99))


def test_weights_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="another shape of"):
        initialise_student(network(hidden_size=32), path)
    with pytest.raises(CheckpointError, match="lacks blocks.1"):
        initialise_student(network(depth=2), path)
    with pytest.raises(CheckpointError, match="unknown"):
        initialise_student(network(use_qknorm=False), write(tmp_path / "b.ckpt", network(use_qknorm=True)))


def test_a_student_may_add_a_second_time_embedder(tmp_path):
    path = write(tmp_path / "a.ckpt", network(3))
    student = LightningDiT(**SIZES, auxiliary_time_cond=True)
    initialise_student(student, path)
    assert torch.equal(student.x_embedder.proj.weight, network(3).x_embedder.proj.weight)
    assert student.r_embedder.mlp[2].weight.abs().max() == 0, "the new embedder starts silent"
