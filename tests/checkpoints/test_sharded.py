"""Sharded checkpoints as folders: read safely, found in a run, and replaced without a moment in which there is none."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flowanchor.base.files import replace, superseded, unfinished
from flowanchor.checkpoints import initialise_student, latest_checkpoint, load_model, read_checkpoint
from flowanchor.checkpoints.digest import file_digest
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.sharded import (
    INDEX,
    META,
    is_sharded,
    read_whole,
    write_sharded,
)
from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.lightningdit import LightningDiT

SIZES = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
TARGET = "flowanchor.plugins.backbones.lightningdit.LightningDiT"
INTERVAL = {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}


def network(seed: int = 0, **settings: Any) -> LightningDiT:
    torch.manual_seed(seed)
    made = LightningDiT(**{**SIZES, "num_classes": 3, **settings})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def content(step: int = 7) -> dict[str, Any]:
    student = network()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.8, 0.9))
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    config = {"backbone": {"_target_": TARGET, **SIZES, "num_classes": 3}, "objective": {"interval": INTERVAL}}
    return {
        "state_dict": {f"student.{name}": value for name, value in student.state_dict().items()},
        "ema": {"power_0.2": network(1).state_dict(), "constant_0.9": network(2).state_dict()},
        "optimizer_states": [optimizer.state_dict()],
        "flowanchor": {"format": 1, "kind": "flow", "step": step, "config": config},
        "loops": {"epoch": 3},
    }


def write(folder: Path, **kwargs: Any) -> dict[str, Any]:
    written = content(**kwargs)
    write_sharded(folder, written)
    return written


def test_what_was_written_comes_back(tmp_path, assert_same):
    written = write(tmp_path / "a.ckpt")
    assert is_sharded(tmp_path / "a.ckpt")
    assert_same(read_whole(tmp_path / "a.ckpt"), written)
    meta = torch.load(tmp_path / "a.ckpt" / META, weights_only=True)
    assert "state_dict" not in meta and not meta["optimizer_states"][0]["state"], "tensors lie in the shards"


def test_a_run_folder_with_a_sharded_checkpoint_is_opened(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    written = write(path)
    model = load_model(tmp_path / "run")
    assert model.ema == "power_0.2" and model.path == str(path) and model.step == 7 and len(model.digest) == 12
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, written["ema"]["power_0.2"][name])
    assert load_model(path, ema="none").ema == "none"
    student = network(9)
    initialise_student(student, path, ema="constant_0.9")
    assert torch.equal(student.pos_embed, written["ema"]["constant_0.9"]["pos_embed"])
    with pytest.raises(CheckpointError, match="no EMA profile 'median': choose one of power_0.2, constant_0.9, none"):
        load_model(path, ema="median")
    with pytest.raises(CheckpointError, match="another shape of"):
        initialise_student(network(hidden_size=32), path)
    with pytest.raises(CheckpointError, match="lacks blocks.1"):
        initialise_student(network(depth=2), path)


def test_the_digest_is_of_the_content(tmp_path):
    write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = file_digest(tmp_path / "a")
    assert before == file_digest(tmp_path / "b")
    part = next(path for path in (tmp_path / "b").iterdir() if path.suffix == ".distcp")
    changed = bytearray(part.read_bytes())
    changed[-100] ^= 1
    part.write_bytes(changed)
    assert file_digest(tmp_path / "b") != before


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("place", [INDEX, META, "index_entry"])
def test_a_malicious_folder_is_refused_and_never_run(tmp_path, place):
    folder, trap = tmp_path / "a.ckpt", tmp_path / "sprung"
    write(folder)
    if place == META:
        torch.save({"flowanchor": Bomb(trap)}, folder / META)
    elif place == INDEX:
        (folder / INDEX).write_bytes(pickle.dumps(Bomb(trap)))
    else:
        index = pickle.loads((folder / INDEX).read_bytes())
        index.planner_data = Bomb(trap)
        (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="read safely"):
        load_model(folder)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Bomb(trap))).close()
    assert trap.exists(), "the bomb is real"


def test_an_entry_that_hides_a_pickle_is_no_tensor(tmp_path):
    """torch.distributed.checkpoint unpickles entries that are not tensors without restriction."""
    import torch.distributed.checkpoint as dcp

    folder, trap = tmp_path / "a.ckpt", tmp_path / "sprung"
    tensors = {f"state_dict/{name}": value for name, value in content()["state_dict"].items()}
    with pytest.warns(UserWarning):
        dcp.save({**tensors, "state_dict/student.pos_embed": Bomb(trap)}, checkpoint_id=folder)
    torch.save({"flowanchor": content()["flowanchor"]}, folder / META)
    trap.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="lacks pos_embed"):
        load_model(folder)
    assert not trap.exists()


def test_a_damaged_index_is_one_sentence(tmp_path):
    write(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / INDEX).write_bytes((tmp_path / "a.ckpt" / INDEX).read_bytes()[:50])
    with pytest.raises(CheckpointError, match="its index .* cut off"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_folder_without_its_last_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    write(path)
    (path / META).unlink()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no checkpoints/last.ckpt"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("killed_after", ["nothing", "part", "write", "first move", "second move", "removal"])
def test_a_killed_save_leaves_a_checkpoint(tmp_path, monkeypatch, killed_after):
    """The moves of a save, cut off after each of them: the run can always go on, and the next save succeeds."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    write(path, step=1)

    class Killed(Exception):
        pass

    moves = {"first move": 1, "second move": 2}
    if killed_after != "nothing":
        write(unfinished(path), step=2)
    if killed_after == "part":
        (unfinished(path) / META).unlink()
    done = []
    rename = Path.rename

    def counted(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        done.append(target)
        if len(done) == moves.get(killed_after):
            raise Killed
        return moved

    if killed_after in (*moves, "removal"):
        monkeypatch.setattr(Path, "rename", counted)
        if killed_after in moves:
            with pytest.raises(Killed):
                replace(unfinished(path), path)
        else:
            replace(unfinished(path), path)
        monkeypatch.undo()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    newer = killed_after in ("second move", "removal")
    assert read_checkpoint(found)["flowanchor"]["step"] == (2 if newer else 1)
    assert read_checkpoint(tmp_path)["flowanchor"]["step"] == (2 if newer else 1)

    shutil.rmtree(unfinished(path), ignore_errors=True)
    write(unfinished(path), step=3)
    replace(unfinished(path), path)
    assert read_checkpoint(path)["flowanchor"]["step"] == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"] and not superseded(path).exists()


def test_a_file_and_a_folder_replace_each_other(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(content(step=1), path)
    write(unfinished(path), step=2)
    replace(unfinished(path), path)
    assert is_sharded(path)
    torch.save(content(step=3), unfinished(path))
    replace(unfinished(path), path)
    assert path.is_file() and read_checkpoint(path)["flowanchor"]["step"] == 3
