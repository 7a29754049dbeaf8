"""No separation: shortcut and anchor are asked at the same time."""

from __future__ import annotations

from torch import Tensor

from flowanchor.interfaces import Interval, Question


class PlainInterval(Interval):
    """Both branches are conditioned on `t` in [0, 1] (sCM, ordinary flow matching)."""

    separates = False

    def shortcut(self, t: Tensor, end: Tensor | None = None) -> Question:
        return Question(t)

    def anchor(self, t: Tensor) -> Question:
        return Question(t)
