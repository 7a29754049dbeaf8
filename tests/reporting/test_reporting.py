"""Grids, plots and pages: what is in the picture, not only that there is one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowanchor.errors import ConfigError, DataError
from flowanchor.reporting.grids import GAP, join, labelled_grid, save_grid
from flowanchor.reporting.html import Page
from flowanchor.reporting.plots import QualityCurve, loss_figure, quality_figure, quality_plot, read_metrics


def flat(levels: list[int], size: int = 8, channels: int = 1) -> np.ndarray:
    """One image of even brightness per level."""
    return np.stack([np.full((size, size, channels), level, np.uint8) for level in levels])


def test_grid_places_images_by_class() -> None:
    levels = [10, 200, 20, 210, 30, 220]  # even ones are of class 0, odd ones of class 1
    picture = labelled_grid(flat(levels), labels=[0, 1] * 3, class_names=["zero", "one"])
    edge = 40  # 8 pixels, five times enlarged
    left = picture.width - 3 * (edge + GAP) - GAP
    assert left > 20  # room for the names
    assert picture.height == 2 * (edge + GAP) + GAP
    for row, expected in enumerate([[10, 20, 30], [200, 210, 220]]):
        for column, level in enumerate(expected):
            x, y = left + GAP + column * (edge + GAP), GAP + row * (edge + GAP)
            patch = np.asarray(picture)[y : y + edge, x : x + edge]
            assert (patch == level).all()
    assert (np.asarray(picture)[:, : left - 2] < 128).any()  # names are written there


def test_grid_enlarges_by_whole_pixels() -> None:
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 1] = (255, 0, 0)
    picture = np.asarray(labelled_grid(image, scale=4))
    assert set(map(tuple, picture[GAP : GAP + 8, GAP : GAP + 8].reshape(-1, 3).tolist())) == {(0, 0, 0), (255, 0, 0)}
    assert (picture[GAP : GAP + 4, GAP + 4 : GAP + 8] == (255, 0, 0)).all()


def test_grid_breaks_long_rows_and_large_images_stay(tmp_path: Path) -> None:
    assert labelled_grid(flat([0] * 20, size=64)).size == (5 * 66 + 2, 4 * 66 + 2)
    assert labelled_grid(flat([0] * 5), labels=[3] * 5, columns=2).height == 3 * 42 + 2
    path = save_grid(tmp_path / "new/grid.png", flat([0, 255]), columns=2)
    assert Image.open(path).size == (2 * 42 + 2, 42 + 2)
    joined = join([labelled_grid(flat([0] * 4)), labelled_grid(flat([0]))], ["four", "one"])
    assert joined.width > 2 * 42 + 42


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 1)), np.zeros((0, 8, 8, 1), np.uint8)]
)
def test_grid_refuses_what_is_no_batch_of_images(images: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="uint8 images"):
        labelled_grid(images)


CURVES = [
    QualityCurve("teacher", [50, 1, 8, 2], [2.26, 79.0, 3.9, 25.0]),
    QualityCurve("student", [1, 2, 4], [2.6, 2.9, 2.5]),
]


def test_quality_plot_shows_every_point_on_log_axes(tmp_path: Path) -> None:
    ax = quality_figure(CURVES, metric="FD-digits", floor=1.1).axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [list(line.get_xdata()) for line in ax.lines[:2]] == [[1, 2, 8, 50], [1, 2, 4]]
    assert list(ax.lines[0].get_ydata()) == [79.0, 25.0, 3.9, 2.26]
    assert "FD-digits" in ax.get_ylabel() and "NFE" in ax.get_xlabel()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["teacher", "student", "held-out floor 1.1"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "4", "8", "50"]
    with Image.open(quality_plot(tmp_path / "plots/quality.png", CURVES)) as image:
        assert image.width > 600


def test_loss_curves_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text(
        "epoch,step,train/anchor,train/loss,train/shortcut,val/loss\n0,9,0.5,1.5,1.0,\n0,9,,,,1.2\n0,19,0.25,0.5,0.25,\n"
    )
    series = read_metrics(log)
    assert series["train/loss"] == ([9, 19], [1.5, 0.5]) and series["val/loss"] == ([9], [1.2])
    ax = loss_figure({"student": series}).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["loss", "anchor", "shortcut", "validation loss"]
    assert ax.get_title() == "student" and ax.get_xlabel() == "optimizer step"
    with pytest.raises(DataError, match="logger=csv"):
        read_metrics(tmp_path / "none.csv")


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    page = (
        Page("A <title>")
        .heading("Scores")
        .table([{"model": "a<b", "fd": 2.6123456, "n": 1000}], {"model": "model", "fd": "FD"})
    )
    page.picture(labelled_grid(flat([1, 2])), "grid & co").pictures({"plot": quality_figure(CURVES)})
    page.settings({"seed": 0, "guidance": None, "quick": False}).code("python src/train.py 'a=b'")
    text = page.save(tmp_path / "deep/report.html").read_text()
    assert "A &lt;title&gt;" in text and "a&lt;b" in text and "grid &amp; co" in text
    assert "<td>2.612</td>" in text and "1000" not in re.sub(r"base64,[^\"]*", "", text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,iVBOR") for s in sources)
    assert not re.search(r"https?://|@import|<script|url\(", re.sub(r"base64,[^\"]*", "", text))
