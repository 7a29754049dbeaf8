"""Pictures in docs are those of their records: each file says what it shows, and no record says anything else."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

import forgetting
import pictures

DRAWINGS = pictures.drawings()


SLOW = {"rooms.png"}  # reads every file of the code


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in DRAWINGS])
def test_a_picture_is_that_of_its_record(name):
    shows, kept, has = pictures.said(pictures.FOLDER / name)
    assert kept == has, f"{name} was changed after it was drawn: python benchmarks/pictures.py --all"
    assert shows == pictures.shown(DRAWINGS[name]()), f"{name} is older than its record: python benchmarks/pictures.py"


def test_every_picture_is_drawn_from_a_record_or_known_not_to_be():
    files = {path.name for path in pictures.FOLDER.iterdir()}
    assert files == {*DRAWINGS, *pictures.UNRECORDED} and not set(DRAWINGS) & set(pictures.UNRECORDED)


def test_another_number_in_the_record_is_noticed():
    content = json.loads(forgetting.RECORD.read_text())
    before = pictures.shown(forgetting.figure(content))
    assert before == pictures.shown(forgetting.figure(json.loads(json.dumps(content))))
    content["rows"][0]["curves"][-1]["lines"][0]["cosine"] *= 0.999
    assert pictures.shown(forgetting.figure(content)) != before


def figure(**other):
    """A curve, a square, a word, an arrow, an image, a name of a tick."""
    told = {"y": 2.0, "corner": 0.5, "word": "a", "tip": 1.0, "pixel": 3.0, "tick": "x1", "colour": "red"} | other
    drawn = Figure()
    one, two = drawn.subplots(1, 2)
    one.plot([0, 1], [1, told["y"]], color=told["colour"])
    one.axvspan(0.1, told["corner"])
    one.text(0.5, 1.5, told["word"], fontsize=other.get("size", 9))
    one.annotate("", xy=(told["tip"], 1), xytext=(0, 0), arrowprops={"arrowstyle": "->"})
    two.imshow([[1.0, told["pixel"]]])
    two.set_xticks([0], [told["tick"]])
    return drawn


@pytest.mark.parametrize(
    "change", [{"y": 2.1}, {"corner": 0.6}, {"word": "b"}, {"tip": 2}, {"pixel": 4.0}, {"tick": "x2"}, {"colour": "b"}]
)
def test_what_is_drawn_otherwise_has_another_hash(change):
    assert pictures.shown(figure(**change)) != pictures.shown(figure())


def test_how_it_is_rendered_has_none(tmp_path):
    pictures.keep(figure(), tmp_path / "a.png")
    pictures.keep(figure(size=12), tmp_path / "b.png")
    first, second = (pictures.said(tmp_path / name) for name in ("a.png", "b.png"))
    assert first[0] == second[0] == pictures.shown(figure()) and first[1] == first[2] != second[2]
    with Image.open(tmp_path / "a.png") as picture:
        picture.save(tmp_path / "packed.png", compress_level=0)  # its text is lost, its pixels are not
        assert pictures.said(tmp_path / "packed.png") == (None, None, first[2])
