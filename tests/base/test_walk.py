"""Every file below a folder is found once, through links, and loops end."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from flowanchor.base.walk import walk


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(root: Path, **settings) -> list[str]:
    return [os.path.relpath(entry.path, root) for entry in walk(root, **settings)]


def test_linked_folders_are_entered_and_loops_end(tmp_path):
    root = tmp_path / "set"
    touch(root / "a" / "0", root / "b" / "1", tmp_path / "elsewhere" / "deep" / "2")
    for link, target in (
        ("a/extra", "../../elsewhere"),
        ("a/self", "."),
        ("a/up", "../.."),
        ("again", "a"),  # before `a` in no order: what is there under its real name has that one
        ("b/gone", "nowhere"),
        ("b/circle", "circle"),
    ):
        (root / link).symlink_to(target)
    assert sorted(names(root)) == ["a/0", "a/extra/deep/2", "b/1", "b/circle", "b/gone"]


def test_the_order_depends_on_names_alone(tmp_path, monkeypatch):
    touch(*(tmp_path / f"{folder}/{name}" for folder in "cab" for name in "zxy"))
    (tmp_path / "0").symlink_to("c")
    expected = [f"{folder}/{name}" for folder in "abc" for name in "xyz"]
    assert names(tmp_path) == expected
    listed = os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(reversed(sorted(listed(path), key=lambda e: e.name))))
    assert names(tmp_path) == expected


def test_hidden_names_are_counted_unless_asked_for(tmp_path):
    touch(*(tmp_path / name for name in (".DS_Store", "a/._0.png", "a/0.png", ".git/x", "__MACOSX/y")))
    left_out = Counter[str]()
    assert names(tmp_path, left_out=left_out) == ["a/0.png"] and left_out == {"hidden": 4}
    assert len(names(tmp_path, hidden=True)) == 5
    inside = tmp_path / ".git"  # the folder that is asked for may be called anything
    assert names(inside) == ["x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_counted(tmp_path):
    touch(tmp_path / "a" / "0", tmp_path / "b" / "1")
    (tmp_path / "b").chmod(0)
    left_out = Counter[str]()
    assert names(tmp_path, left_out=left_out) == ["a/0"] and left_out == {"folders that cannot be read": 1}
    (tmp_path / "b").chmod(0o700)
