"""Grids, plots and pages: what is in the picture, not only that there is one."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from flowanchor.errors import ConfigError, DataError
from flowanchor.reporting.figures import fit, labels, new_figure
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


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_quality_plot_shows_every_point_on_log_axes(tmp_path: Path) -> None:
    figure = quality_figure(CURVES, metric="FD-digits", floor=1.1)
    ax = figure.axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [list(line.get_xdata()) for line in ax.lines[:2]] == [[1, 2, 8, 50], [1, 2, 4]]
    assert list(ax.lines[0].get_ydata()) == [79.0, 25.0, 3.9, 2.26]
    assert "FD-digits" in ax.get_ylabel() and "NFE" in ax.get_xlabel()
    assert legend(figure) == ["teacher", "student", "held-out floor 1.1"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "4", "8", "50"]
    assert sorted(text.get_text() for text in ax.texts) == sorted(["79", "25", "3.9", "2.26", "2.6", "2.9", "2.5"])
    with Image.open(quality_plot(tmp_path / "plots/quality.png", CURVES)) as image:
        assert image.width > 600


def crowd(n: int) -> list[QualityCurve]:
    """Curves that lie on each other."""
    return [QualityCurve(f"run {i}", (1, 2, 4), [5 + i / 20, 3 + i / 50, 2.5], [0.3] * 3) for i in range(n)]


def overlaps(boxes: list[Bbox]) -> bool:
    return any(a.padded(-0.5).overlaps(b.padded(-0.5)) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("curves", [CURVES, crowd(6), crowd(8), crowd(30)], ids=["two", "six", "eight", "thirty"])
def test_nothing_hides_anything(curves: list[QualityCurve]) -> None:
    figure = quality_figure(curves, floor=2.0)
    figure.draw_without_rendering()
    (ax,) = figure.axes
    below, page = figure.legends[0].get_window_extent(), figure.bbox
    assert not below.overlaps(ax.get_tightbbox()) and below.y0 >= 0 and page.x0 <= below.x0 and below.x1 <= page.x1
    values = [text.get_window_extent() for text in ax.texts]
    assert len(values) >= len(curves) and not overlaps(values)
    names = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert not overlaps(names) and all(page.x0 <= box.x0 for box in [*names, *values])
    assert all(box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in [*names, *values])


def test_many_curves_stand_in_a_row_each_the_best_at_the_top() -> None:
    curves = [QualityCurve(f"run {i}", (1, 2), [30 - i, 20 - i / 2]) for i in range(12)]
    ax = quality_figure(curves).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"run {i}" for i in reversed(range(12))]
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and len({line.get_marker() for line in ax.lines}) == 2


@pytest.mark.parametrize(
    ("low", "high"), [(4.0, 4.6), (2.26, 79), (0.03, 2), (1e-6, 1e7), (90, 130), (0.9, 11), (1, 1.02), (1e-4, 3e-4)]
)
def test_ticks_of_a_logarithmic_axis_can_be_read(low: float, high: float) -> None:
    ax = new_figure(5, 4)[1][0]
    ax.plot([1, 2], [low, high])
    fit(ax.yaxis, [low, high], log=True)
    at = [value for value in ax.yaxis.get_majorticklocs() if ax.get_ylim()[0] <= value <= ax.get_ylim()[1]]
    texts = [ax.yaxis.get_major_formatter()(value) for value in at]
    assert 3 <= len(at) <= 9 and len(set(texts)) == len(texts)
    assert [float(text) for text in texts] == pytest.approx(at, rel=1e-3) and max(map(len, texts)) <= 6


@pytest.mark.parametrize(
    "curves",
    [
        [QualityCurve("one point", [2], [3.0])],
        [QualityCurve("equal", [1, 2, 4], [3.0, 3.0, 3.0])],
        [
            QualityCurve("partly", [1, 2], [math.nan, 3.0], [0.1, math.nan]),
            QualityCurve("never", [1, 2], [math.inf] * 2),
        ],
        [QualityCurve("below zero", [1, 2, 4], [1.0, 0.1, -0.01])],
        [],
    ],
    ids=lambda curves: curves[0].name if curves else "none",
)
def test_axes_do_not_collapse(curves: list[QualityCurve]) -> None:
    figure = quality_figure(curves)
    figure.draw_without_rendering()
    (ax,) = figure.axes
    for low, high in (ax.get_xlim(), sorted(ax.get_ylim())):
        assert math.isfinite(low) and math.isfinite(high) and high - low > 0.1 * abs(low)
    (x0, x1), (y1, y0) = ax.get_xlim(), sorted(ax.get_ylim(), reverse=True)
    inside = [(x, y) for line in ax.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    assert all(x0 < x < x1 and y0 < y < y1 for x, y in inside)


def test_labels_say_what_differs() -> None:
    long = [f"relaxation_exponent={p} optimizer_rate={lr}" for p in (0.25, 0.5) for lr in ("1e-4", "2e-4")]
    found, heading = labels(long, 30)
    assert found == ["0.25 · 1e-4", "0.25 · 2e-4", "0.5 · 1e-4", "0.5 · 2e-4"]
    assert heading == "relaxation_exponent · optimizer_rate"
    assert labels(["facm", "lr=1"], 30) == (["facm", "lr=1"], "")
    cut, _ = labels(["x" * 50 + str(i % 2) + "y" * 50 for i in range(4)], 20)
    assert len(set(cut)) == 4 and all("…" in label for label in cut)


def test_loss_curves_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text(
        "epoch,step,train/anchor,train/loss,train/shortcut,val/loss\n0,9,0.5,1.5,1.0,\n0,9,,,,1.2\n0,19,0.25,0.5,0.25,\n"
    )
    series = read_metrics(log)
    assert series["train/loss"] == ([9, 19], [1.5, 0.5]) and series["val/loss"] == ([9], [1.2])
    figure = loss_figure({"student": series})
    (ax,) = figure.axes
    assert legend(figure) == ["loss", "anchor", "shortcut", "validation loss"]
    assert ax.get_title() == "student" and ax.get_xlabel() == "optimizer step"
    with pytest.raises(DataError, match="logger=csv"):
        read_metrics(tmp_path / "none.csv")


def test_a_table_marks_and_folds() -> None:
    rows = [{"run": "a", "folder": "outputs/train/a", "fd": 2.5}, {"run": "b", "folder": "outputs/train/b", "fd": 1.5}]
    text = Page("x").table(rows, best={(1, "fd")}, cards=True, folded=True).html()
    assert '<td class="best" data-name="fd">1.5</td>' in text and text.count('class="best"') == 1
    assert "<summary>2 rows</summary>" in text and "outputs/<wbr>train/<wbr>a" in text and "max-width: 40rem" in text


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
