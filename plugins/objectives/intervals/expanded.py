"""The expanded time interval of FACM: time reflected about the data end, without new parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.interfaces import Interval, Question


class ExpandedInterval(Interval):
    """Shortcut on `t` in [0, 1], anchor on `2 - t` in [1, 2] (FACM, arXiv 2507.03738)."""

    def shortcut(self, t: Tensor, end: Tensor | None = None) -> Question:
        return Question(t if end is None else torch.where(end == t, 2 - t, t))

    def anchor(self, t: Tensor) -> Question:
        return Question(2 - t)

    def pretraining(self, t: Tensor) -> Question:
        """Stage 1 trains the same velocity on both halves: the first half of the batch on `t`, the rest on `2 - t`."""
        half = t.shape[0] // 2
        return Question(torch.cat([t[:half], 2 - t[half:]]))
