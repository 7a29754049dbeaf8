"""A second time embedder tells the branches apart."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, Question


class AuxiliaryInterval(Interval):
    """Shortcut on `(t, r = end)`, anchor on `(t, r = t)`; the backbone must embed `r` (FACM's ablation).

    Args:
        told: what the second embedder is told: the `end` of the average, or its `span`, end - t, as in MeanFlow
            (arXiv 2505.13447), where an instantaneous velocity is one of span 0.
    """

    needs_end_time = True
    tells_end = True

    def __init__(self, told: Literal["end", "span"] = "end") -> None:
        if told not in ("end", "span"):
            raise ConfigError(f"objective.interval.told={told}: choose end or span.")
        self.told = told
        self.end_rate = -1.0 if told == "span" else 0.0

    def check(self, backbone: Backbone) -> None:
        super().check(backbone)
        if self.told == "span" and backbone.end_time in ("decoupled", "gated"):
            raise ConfigError(
                f"objective/interval=span tells how far the end is, and a network with backbone.end_time="
                f"{backbone.end_time} is to be told where: choose objective/interval={backbone.end_time}."
            )

    def shortcut(self, t: Tensor, end: Tensor | None = None) -> Question:
        end = torch.ones_like(t) if end is None else end
        return Question(t, end - t if self.told == "span" else end)

    def anchor(self, t: Tensor) -> Question:
        return Question(t, torch.zeros_like(t) if self.told == "span" else t)
