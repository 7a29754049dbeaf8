"""A run does not go on from a checkpoint with a hole: it goes on from the one before it, which is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flowanchor.base.files import superseded
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.checkpoints.lightning import RunCheckpointIO
from flowanchor.checkpoints.read import read_checkpoint
from flowanchor.checkpoints.sharded import is_sharded, write_sharded
from flowanchor.checkpoints.soundness import damage, readable, refuse_damaged, sound_checkpoint
from flowanchor.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def content(step: int) -> dict:
    torch.manual_seed(step)
    meta = {"format": 1, "kind": "flow", "step": step, "config": {}}
    return {"flowanchor": meta, "state_dict": {"student.w": torch.randn(100, 100)}, "global_step": step}


def step_of(path: Path) -> int:
    return int(read_checkpoint(path)["flowanchor"]["step"])


def write(path: Path, step: int, sharded: bool = False) -> None:
    if sharded:
        write_sharded(path, content(step))
    else:
        RunCheckpointIO().save_checkpoint(content(step), path)


def hole(path: Path) -> None:
    file = next(path.glob("__0_*")) if path.is_dir() else path
    raw = bytearray(file.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 4096] = bytes(4096)
    file.write_bytes(raw)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_run_goes_on_from_the_one_before(tmp_path: Path, sharded: bool) -> None:
    last = tmp_path / "last.ckpt"
    write(superseded(last), 1, sharded)
    write(last, 2, sharded)
    assert damage(last) is None and sound_checkpoint(last) == last and step_of(last) == 2
    hole(last)
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged .*last.ckpt.damaged.*before it, of step 1"):
        assert sound_checkpoint(last) == last
    assert step_of(last) == 1 and is_sharded(last) == sharded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.damaged"]
    hole(last)
    with pytest.raises(CheckpointError, match="is damaged .*and there is none before it: start afresh"):
        sound_checkpoint(last)


def test_where_both_are_damaged_nothing_is_moved(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    for path, step in ((superseded(last), 1), (last, 2)):
        write(path, step)
        hole(path)
    with pytest.raises(CheckpointError, match="so is the one before it"):
        sound_checkpoint(last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.previous"]


def test_the_step_of_a_file_that_cannot_be_read_is_that_of_the_one_before(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    write(superseded(last), 7)
    last.write_bytes(b"half")
    assert readable(last) == superseded(last)
    superseded(last).unlink()
    with pytest.raises(CheckpointError):
        readable(last)


@pytest.mark.parametrize("kind", ["last.ckpt", "folder.ckpt", "one.safetensors"])
def test_damaged_weights_are_not_published(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind.endswith(".safetensors"):
        write_consolidated(path, {"w": torch.randn(100, 100)}, {"kind": "flow", "step": 1, "config": {}}, "none")
    else:
        write(path, 1, sharded=kind == "folder.ckpt")
    refuse_damaged(path)
    hole(path)
    with pytest.raises(CheckpointError, match=r"is damaged \(.*\): copy it again"):
        refuse_damaged(path)


def test_a_checkpoint_is_written_beside_its_target_with_the_rights_of_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, last = RunCheckpointIO(), tmp_path / "last.ckpt"
    io.kept.add(last)
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    moves: list[tuple[Path, Path]] = []
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, _told(getattr(os, name), moves))
    monkeypatch.setattr(Path, "rename", _told(Path.rename, moves))
    for step in (1, 2):
        io.save_checkpoint(content(step), last)
    assert all(source.parent == target.parent == tmp_path for source, target in moves) and len(moves) >= 3
    assert not list(elsewhere.iterdir())
    assert sorted(path.name for path in tmp_path.glob("last*")) == ["last.ckpt", "last.ckpt.previous"]
    assert step_of(last) == 2 and step_of(superseded(last)) == 1
    mask = os.umask(0)
    os.umask(mask)
    assert last.stat().st_mode & 0o777 == 0o666 & ~mask


def _told(move, moves):
    def told(source, target):
        moves.append((Path(source), Path(target)))
        return move(source, target)

    return told


def test_a_full_disk_is_an_os_error_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = tmp_path / "last.ckpt"
    write(last, 1)
    save = torch.save

    def full(value, file):
        class Full:
            def write(self, block):
                raise OSError(28, "No space left on device")

            def flush(self):
                pass

        save(value, Full())

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(last, 2)
    assert caught.value.errno == 28
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] and step_of(last) == 1
