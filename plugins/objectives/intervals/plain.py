"""No separation: shortcut and anchor are told the same time."""

from __future__ import annotations

from torch import Tensor

from flowanchor.interfaces import Condition, Interval


class PlainInterval(Interval):
    """Both branches are conditioned on `t` in [0, 1] (sCM, ordinary flow matching)."""

    separates = False

    def shortcut(self, t: Tensor, end: Tensor | None = None) -> Condition:
        return Condition(t)

    def anchor(self, t: Tensor) -> Condition:
        return Condition(t)
