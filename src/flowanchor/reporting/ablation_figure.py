"""Loss and tangent norm over time, one panel per objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def ablation_figure(runs: Mapping[str, Sequence[Curves]], columns: int = 4) -> Figure:
    """Objective -> its runs' `loss` and `tangent_norm` curves; every seed is a thin line."""
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    norms = [
        value for members in runs.values() for curves in members for value in curves.get("tangent_norm", ((), ()))[1]
    ]
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, members) in zip(panels, runs.items(), strict=False):
        right = panel.twinx()
        for curves in members:
            for key, axis, colour in (("loss", panel, "#1f77b4"), ("tangent_norm", right, "#d62728")):
                if key in curves:
                    axis.plot(*curves[key], color=colour, linewidth=0.8, alpha=0.8)
        panel.set_title(name, fontsize=9)
        panel.tick_params(axis="both", labelsize=7)
        panel.tick_params(axis="y", colors="#1f77b4")
        right.set_yscale("log")
        right.set_ylim(*_limits(norms))  # one scale for all panels: it is what they are compared by
        right.tick_params(axis="y", which="both", labelsize=6, colors="#d62728")
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("loss (blue); norm of the tangent (red, logarithmic)", fontsize=9)
    return figure


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the finite positive values span."""
    finite = [value for value in values if 0 < value < float("inf")]
    return (0.9 * min(finite), 1.1 * max(finite)) if finite else (0.1, 1.0)
