"""How often a network is asked while something is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowanchor.interfaces import Backbone


@dataclass
class Watched:
    """What was seen.

    Attributes:
        asked: samples that the network was asked about, each time that it was.
    """

    asked: int = 0


@contextmanager
def watching(network: Backbone) -> Iterator[Watched]:
    """Within it every question to the network, by whatever sampler, is counted. One at a time per network."""
    seen, own = Watched(), network.predict

    def predict(x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        seen.asked += len(x)
        return own(x, t, cond, r)

    network.__dict__["predict"] = predict  # in front of the class' own
    try:
        yield seen
    finally:
        del network.__dict__["predict"]
