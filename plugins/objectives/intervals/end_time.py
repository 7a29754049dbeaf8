"""The end told to a network that starts as the pretrained one exactly: decoupled, or gated."""

from __future__ import annotations

from flowanchor.errors import ConfigError
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval


class EndTimeInterval(AuxiliaryInterval):
    """Shortcut on `(t, r = end)`, anchor and samples with `r = t` on `(t, r = t)`, where the network is its teacher.

    Args:
        end_time: `decoupled` (DMF, arXiv 2510.24474) or `gated` (AnyFlow, arXiv 2605.13724): in which way the backbone
            must be told the end (`backbone.end_time`, which follows it unless it is set).
    """

    def __init__(self, end_time: str = "gated") -> None:
        super().__init__(told="end")
        if end_time not in ("decoupled", "gated"):
            raise ConfigError(f"objective.interval.end_time={end_time}: choose decoupled or gated.")
        self.end_time = end_time
