"""What is saved of an evaluation, and what becomes of it with another number of processes."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from flowanchor.errors import ConfigError
from flowanchor.metrics.collected import Collected, Layers, Wanted
from flowanchor.metrics.partial_results import PartialResults
from flowanchor.metrics.storage import read_arrays, write_whole

WANTED = Wanted(100)


def part(*ranges):
    found = Collected(WANTED)
    for start, stop in ranges:
        values = np.arange(start, stop, dtype=np.float32)[:, None]
        found.add(start, Layers(np.concatenate([values, values**2], 1), values))
    return found


@pytest.fixture
def store(tmp_path):
    return PartialResults(tmp_path, {"seed": 0})


def test_parts_and_lines(store, tmp_path):
    assert store.line("nfe1") is None and store.parts("nfe1", WANTED) == []
    store.save("nfe1", 0, part((0, 30)))
    store.save("nfe1", 1, part((50, 70)))
    store.save("nfe1", 0, part((0, 50)))  # replaces
    merged = PartialResults(tmp_path, {"seed": 0}).merged("nfe1", WANTED)
    assert merged.ranges == [(0, 70)]
    np.testing.assert_array_equal(merged.kept_features()[:, 0], np.arange(70))
    store.finish("nfe1", {"fd": 1.5})
    assert store.line("nfe1") == {"fd": 1.5} and store.parts("nfe1", WANTED) == []
    assert PartialResults(tmp_path, {"seed": 1}).line("nfe1") is None


def test_a_part_that_was_taken_over_does_not_count_twice(store):
    """Three processes were killed; of two, the first took over parts 0 and 2 and saved, the second did not yet."""
    for process, start in enumerate((0, 30, 60)):
        store.save("nfe1", process, part((start, start + 20)))
    store.save("nfe1", 0, part((0, 25), (60, 80)))
    found = store.parts("nfe1", WANTED)
    assert [p.ranges for p in found] == [[(0, 25), (60, 80)], [(30, 50)]]
    assert store.merged("nfe1", WANTED).n == 65


def test_a_damaged_part_is_generated_again(store):
    store.save("nfe1", 0, part((0, 30)))
    store.save("nfe1", 1, part((50, 70)))
    file = store.folder / "nfe1" / "0.npz"
    file.write_bytes(file.read_bytes()[:-100])
    assert store.merged("nfe1", WANTED).ranges == [(50, 70)]


@pytest.mark.parametrize("restart", [False, True])
def test_beginning_removes_other_settings(store, tmp_path, restart):
    other = PartialResults(tmp_path, {"seed": 1})
    for found in (store, other):
        found.finish("nfe1", {"fd": 1.5})
    store.begin(restart)
    assert other.line("nfe1") is None and (store.line("nfe1") is None) == restart


def test_a_full_disk_leaves_what_was_saved(store, monkeypatch):
    store.save("nfe1", 0, part((0, 30)))

    def full(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="no space left.*hydra.run.dir=FOLDER"):
        patch.setattr(np, "savez", full)
        store.save("nfe1", 0, part((0, 60)))
    assert [path.name for path in (store.folder / "nfe1").iterdir()] == ["0.npz"]
    assert store.merged("nfe1", WANTED).n == 30


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", a=np.array([{}], dtype=object))
    assert read_arrays(tmp_path / "evil.npz") is None and read_arrays(tmp_path / "gone.npz") is None
    write_whole(tmp_path / "new" / "a.npz", {"a": np.arange(3)})
    assert read_arrays(tmp_path / "new" / "a.npz")["a"].tolist() == [0, 1, 2]
