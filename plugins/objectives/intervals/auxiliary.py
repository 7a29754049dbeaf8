"""A second time embedder tells the branches apart."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.interfaces import Interval, Question


class AuxiliaryInterval(Interval):
    """Shortcut on `(t, r = end)`, anchor on `(t, r = t)`; the backbone must embed `r` (FACM's ablation, MeanFlow)."""

    needs_end_time = True
    tells_end = True

    def shortcut(self, t: Tensor, end: Tensor | None = None) -> Question:
        return Question(t, torch.ones_like(t) if end is None else end)

    def anchor(self, t: Tensor) -> Question:
        return Question(t, t)
