"""What every figure here has in common: no display, ticks that can be read, a legend beside the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

COLOURS = ("#4c4c4c", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d6a9f", "#3d6bb3", "#a5673f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#c4c8cc"  # of what is there for comparison only
LONGEST = 40  # characters of a label in a figure


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches that belongs to no window system, so that nothing global is touched."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(True, color="#e3e3e3", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=10)
    return figure, list(axes)


def rasterise(figure: Figure) -> Image.Image:
    """The figure's pixels."""
    canvas: Any = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def side_by_side(pictures: Sequence[Image.Image], columns: int = 3) -> Image.Image:
    """Pictures in rows of so many, each row as high as the highest in it."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(sum(picture.width for picture in row) for row in rows)
    heights = [max(picture.height for picture in row) for row in rows]
    page = Image.new("RGB", (width, sum(heights)), color=(255, 255, 255))
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture in row:
            page.paste(picture, (left, top))
            left += picture.width
        top += height
    return page


# --------------------------------------------------------------------------------------------------------------- axes


class PlainTicks(Locator):
    """Ticks of a logarithmic axis at round numbers, three to nine of them: also where it spans less than a decade."""

    def __call__(self) -> Sequence[float]:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Of the range from `vmin` to `vmax`, both above 0."""
        low, high = sorted((float(vmin), float(vmax)))
        if not 0 < low < high < math.inf:
            return []
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            # From the exponent, so that 0.001 is 0.001 and not 0.0010000000000000002.
            ticks = [float(f"{digit}e{exponent}") for exponent in range(first, last + 1) for digit in digits]
            inside = [tick for tick in ticks if low <= tick <= high]
            if len(inside) <= 9:
                break
        if len(inside) > 9:
            inside = inside[:: math.ceil(len(inside) / 9)]
        for bins in (5, 7, 9):
            if len(inside) >= 3:
                break
            steps = MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            inside = [float(tick) for tick in steps if low <= tick <= high and tick > 0]
        return inside


def plain(value: float, _: Any = None) -> str:
    """0.002, 0.5, 20, 5000, 2e+06 as 2e6."""
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def fit(axis: Axis, values: Sequence[float], log: bool, room: float = 0.1) -> None:
    """Limits and ticks of an axis around `values`, with a share of `room` on both sides, also around a single value.

    Logarithmic only where asked for and every value is above 0. Values that are not finite count for nothing.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    set_limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim  # type: ignore[attr-defined]
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale  # type: ignore[attr-defined]
    if log and finite and low > 0:
        set_scale("log")
        apart = max(high / low, 1.2)  # equal values lie in the middle of something
        middle = math.sqrt(low * high)
        grown = apart ** (0.5 + room) * 1.02
        set_limits(middle / grown, middle * grown)
        axis.set_major_locator(PlainTicks())
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        return
    apart = high - low or abs(high) * 0.2 or 1.0
    set_limits(min(low, high) - apart * room, high + apart * room)
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))


def ticks_at(axis: Axis, places: Sequence[int], narrow: bool = False) -> None:
    """Ticks at these numbers, written out; of many that lie close on a logarithmic axis every other bears no number."""
    kept: list[int] = []
    for place in places:
        if not narrow or not kept or place >= 1.35 * kept[-1]:
            kept.append(place)
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: str(round(value)) if round(value) in kept else ""))
    axis.set_minor_locator(NullLocator())


# ------------------------------------------------------------------------------------------------------------- labels


def shorten(label: str, longest: int = LONGEST) -> str:
    """A long label without its middle: what differs is more often at an end."""
    if len(label) <= longest:
        return label
    head = (longest - 1) // 2
    return f"{label[:head]}…{label[-(longest - 1 - head) :]}"


def labels(texts: Sequence[str], longest: int = LONGEST) -> tuple[list[str], str]:
    """Labels that fit into a figure and differ as the texts do, and a heading that says what they are of, or nothing.

    Where one is too long and all of them set the same things, `lr=1e-4 size=8` is 1e-4 · 8 below lr · size. What is
    still too long loses its middle; labels that become alike are numbered.
    """
    heading = ""
    if max(map(len, texts), default=0) > longest:
        words = [[word.partition("=") for word in text.split(" ")] for text in texts]
        keys = {tuple(key for key, _, _ in own) for own in words}
        if len(keys) == 1 and all(equals for own in words for _, equals, _ in own):
            texts = [" · ".join(value for _, _, value in own) for own in words]
            heading = " · ".join(next(iter(keys)))
    short = [shorten(text, longest) for text in texts]
    numbered = [
        f"{label} ({short[: i + 1].count(label)})" if short.count(label) > 1 else label for i, label in enumerate(short)
    ]
    return numbered, heading


def legend_below(figure: Figure, *axes: Axes, heading: str = "") -> None:
    """One legend of these axes below the figure, where it hides no curve; the figure grows by its height."""
    found: dict[str, Any] = {}
    for ax in axes:
        pairs = list(zip(*ax.get_legend_handles_labels(), strict=True))
        # matplotlib lists plain lines first, such as a floor; curves with bars come before them here.
        for handle, label in sorted(pairs, key=lambda pair: not isinstance(pair[0], ErrorbarContainer)):
            found.setdefault(label, handle)
    if not found:
        return
    width, height = figure.get_size_inches()
    # Of 9 points a letter is about 0.075 inches wide, a key and the space beside it 0.55.
    columns = max(1, min(len(found), int(width / (0.55 + 0.075 * max(map(len, found))))))
    rows = -(-len(found) // columns) + bool(heading)
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=9, frameon=False,
        title=shorten(heading, int(width / 0.08)) or None, title_fontsize=9,
    )  # fmt: skip
    figure.set_size_inches(width, height + 0.2 * rows)


def darker(colour: str) -> str:
    """The colour for text: what is light enough for a line is too light for letters."""
    red, green, blue = to_rgb(colour)
    return to_hex((0.72 * red, 0.72 * green, 0.72 * blue))


def write_values(
    ax: Axes, points: Sequence[tuple[float, float, str, str]], spacing: float = 1.15, fontsize: float = 8.5
) -> None:
    """A text beside each point (x, y, text, colour); texts of one x are moved up and down until none hides another.

    Call it last: places are measured in the figure as it is then.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # places the axes
    step = fontsize * figure.dpi / 72 * spacing
    bottom, top = ax.bbox.y0, ax.bbox.y1
    for place in dict.fromkeys(x for x, *_ in points):
        column = sorted((point for point in points if point[0] == place), key=lambda point: point[1])
        own = [float(ax.transData.transform((x, y))[1]) for x, y, *_ in column]
        # A little above: most curves fall, and go below their values then.
        heights = _apart([height + 0.6 * step for height in own], step, bottom + step / 2, top)
        for (x, y, text, colour), height, here in zip(column, heights, own, strict=True):
            note = ax.annotate(
                text, (x, y), textcoords="offset points", xytext=(6, (height - here) * 72 / figure.dpi),
                ha="left", va="center", fontsize=fontsize, color=darker(colour), zorder=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "boxstyle": "square,pad=0.05"},
            )  # fmt: skip
            note.set_in_layout(False)  # else the axes would move away from what was measured


def _apart(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Heights near the wanted ones (ascending), at least `step` apart; between `low` and `high` where they fit."""
    groups: list[tuple[float, int]] = []  # the middle of texts that touch, and how many they are
    for height in wanted:
        middle, count = height, 1
        while groups and groups[-1][0] + (groups[-1][1] + count) / 2 * step > middle:
            before, more = groups.pop()
            middle, count = (before * more + middle * count) / (more + count), more + count
        groups.append((middle, count))
    heights = [middle + (i - (count - 1) / 2) * step for middle, count in groups for i in range(count)]
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], high if i == len(heights) - 1 else heights[i + 1] - step)
    for i in range(len(heights)):
        heights[i] = max(heights[i], low if i == 0 else heights[i - 1] + step)
    return heights
