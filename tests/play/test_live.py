"""A run in progress is read as far as it is written, and left as it is."""

from __future__ import annotations

import hashlib
import json

import pytest

from flowanchor.errors import CheckpointError, DataError
from flowanchor.play.drawing import Wish
from flowanchor.play.live import fingerprint, glance, is_run, picture
from flowanchor.play.quality import evaluations, home_of, quality
from flowanchor.play.studio import Studio

REPORT = {
    "settings": {"metric": "FD-digits", "num_samples": 100, "checkpoint": "last.ckpt", "ema": "short"},
    "floor": {"n": 50, "fd": 1.1},
    "results": [{"nfe": 1, "fd": 3.5, "sampler": "consistency"}, {"nfe": 2, "fd": 2.25, "sampler": "consistency"}],
}


def state_of(folder):
    """Everything in a folder: bytes, times, modes, the folders too."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        stat = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_mode, stat.st_size, content)
    return found


def test_a_glance_at_a_run_in_progress(run):
    now = glance(run)
    assert now.state.startswith("step 19 of 100, 120 images/s, last row ")
    assert ("train/loss", "step 19", "1.25") in now.scores and ("val/loss", "step 19", "1.75") in now.scores
    assert [path.name for path in now.pictures] == ["step_00000010.png"]
    assert now.losses() is not None


def test_looking_changes_nothing(run):
    (run / "eval").mkdir()
    (run / "eval" / "metrics.json").write_text(json.dumps(REPORT))
    before = state_of(run)
    studio = Studio()
    studio.open(str(run))
    studio.draw(Wish(steps=1))
    now = glance(run)
    now.losses()
    picture(now.pictures[-1])
    fingerprint(run)
    quality(run)
    assert state_of(run) == before


def test_a_row_that_is_being_written_does_not_count(run):
    curves = run / "csv" / "metrics.csv"
    with curves.open("a") as file:
        file.write("0,130.0,2")  # of step 29
    now = glance(run)
    assert now.run.series["images_per_second"] == ([9, 19], [100.0, 120.0])
    with curves.open("a") as file:
        file.write("9,1.125,\n")
    assert glance(run).run.series["train/loss"] == ([9, 19, 29], [1.5, 1.25, 1.125])


@pytest.mark.parametrize("content", ["", "epoch,st", "epoch,images_per_second,step\n", "\x00\x00\n\x00", "a\n\nb,,,\n"])
def test_any_state_of_the_file_can_be_looked_at(run, content):
    (run / "csv" / "metrics.csv").write_text(content)
    now = glance(run)
    assert now.state and now.losses() is None and now.scores == ()


def test_something_new_is_noticed(run):
    before = fingerprint(run)
    assert fingerprint(run) == before
    with (run / "csv" / "metrics.csv").open("a") as file:
        file.write("0,130.0,29,1.125,\n")
    assert fingerprint(run) != before


def test_a_picture_that_is_being_written_is_left_out(run):
    whole = next((run / "samples").glob("*.png"))
    content = whole.read_bytes()
    assert picture(whole) is not None
    for length in (0, 4, len(content) // 2):
        whole.write_bytes(content[:length])
        assert picture(whole) is None
    whole.unlink()
    assert picture(whole) is None


def test_what_is_a_run(run, unborn, tmp_path):
    (unborn / "csv" / "metrics.csv").unlink()
    assert is_run(run) and is_run(unborn)
    assert not is_run(tmp_path) and not is_run(tmp_path / "nowhere") and not is_run(run / "checkpoints")
    with pytest.raises(DataError, match="There are no runs"):
        glance(run / "samples")


def test_a_run_that_has_saved_nothing_can_be_watched_and_drawn_with_later(unborn, run):
    studio = Studio()
    studio.open(str(unborn))
    assert studio.run == unborn and "nothing saved yet" in studio.described()
    with pytest.raises(CheckpointError, match="saved no checkpoint yet"):
        studio.draw(Wish())
    (run / "checkpoints").rename(unborn / "checkpoints")
    studio.open(str(unborn))
    assert studio.draw(Wish(each=1)).images.shape == (10, 8, 8, 1)


def test_the_curve_of_an_evaluation(run):
    assert quality(run) is None
    folder = run / "eval"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(REPORT)[:-30])
    assert evaluations(run) == [] and quality(run) is None  # half-written
    (folder / "metrics.json").write_text(json.dumps(REPORT))
    axes = quality(run).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:1]] == [[3.5, 2.25]]
    assert list(axes.lines[0].get_xdata()) == [1, 2] and "FD-digits" in axes.get_ylabel()


def test_where_evaluations_lie(run, tmp_path):
    assert home_of(run / "checkpoints" / "last.ckpt") == run
    assert home_of(tmp_path / "published" / "model.safetensors") == tmp_path / "published"
