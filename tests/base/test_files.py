"""Everything is written beside its target and moved into place in one move."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowanchor.base.files import (
    flush,
    remove,
    replace,
    replacing,
    sha256,
    superseded,
    unfinished,
    write_json,
    write_tensors,
    write_whole,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "note.txt"
    write_whole(target, "first")
    with pytest.raises(RuntimeError), replacing(target) as draft:
        draft.write_text("half")
        assert draft.parent == target.parent, "on the same file system"
        assert target.read_text() == "first"
        raise RuntimeError("killed")
    assert target.read_text() == "first" and names(tmp_path) == {"note.txt"}


@pytest.mark.parametrize("mask, wanted", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_rights_are_those_of_the_umask(tmp_path: Path, mask: int, wanted: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
        write_tensors(tmp_path / "shared.safetensors", {"w": torch.ones(2)}, shared=True)
        write_whole(tmp_path / "a.npz", {"x": np.zeros(3)})
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {wanted}


def test_content_survives(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": torch.arange(3.0)}, {"k": "v"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], torch.arange(3.0))
    write_whole(tmp_path / "a.txt", "é")
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()
    assert sha256(tmp_path / "a.txt") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"


def test_what_was_there_is_kept_where_asked(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    for text in ("first", "second", "third"):
        write_whole(target, text, keep_previous=True)
    assert target.read_text() == "third" and superseded(target).read_text() == "second"
    assert names(tmp_path) == {"last.ckpt", "last.ckpt.previous"}


def test_folders_and_files_replace_each_other(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    write_whole(target, "file")
    draft = unfinished(target)
    draft.mkdir()
    (draft / "part").write_text("folder")
    flush(draft)
    replace(draft, target)
    assert (target / "part").read_text() == "folder" and names(tmp_path) == {"last.ckpt"}
    write_whole(target, "file again")
    assert target.read_text() == "file again" and names(tmp_path) == {"last.ckpt"}
    remove(target)
    remove(target)
    assert not names(tmp_path)


def test_drafts_of_dead_processes_go_those_of_living_ones_stay(tmp_path: Path) -> None:
    target = tmp_path / "cache.json"
    with replacing(target, shared=True) as draft:
        host, mine = draft.name.removeprefix("cache.json.").removesuffix(".partial").rsplit(".", 1)
        assert int(mine) == os.getpid()
    dead = tmp_path / f"cache.json.{host}.{2**22 + 1}.partial"
    living = tmp_path / f"cache.json.{host}.{os.getppid()}.partial"
    dead.write_text("")
    living.write_text("")
    write_json(target, {}, shared=True)
    assert names(tmp_path) == {"cache.json", living.name}


def test_a_full_disk_is_an_os_error_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No" })')

    monkeypatch.setattr("flowanchor.base.files.save_file", full)
    with pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert caught.value.errno == 28 and not names(tmp_path)
