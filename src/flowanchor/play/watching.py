"""How often a network is asked while something is drawn, and about what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowanchor.interfaces import Backbone


@dataclass
class Watched:
    """What was seen.

    Attributes:
        asked: samples that the network was asked about, each time that it was.
        states: of the first `keep` samples of the first batch, where they were when it was asked, [keep, *] each;
            asked twice at one place, as guidance does, that place stands here once.
    """

    keep: int = 0
    asked: int = 0
    states: list[Tensor] = field(default_factory=list)
    whole: bool = False  # the first batch is done


@contextmanager
def watching(network: Backbone, keep: int = 0) -> Iterator[Watched]:
    """Within it every question to the network, by whatever sampler, is counted. One at a time per network."""
    seen, own = Watched(keep), network.predict

    def predict(x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        seen.asked += len(x)
        if seen.keep and not seen.whole:
            state = x[: seen.keep].detach().clone()
            if not seen.states or not torch.equal(state, seen.states[-1]):
                seen.states.append(state)
        return own(x, t, cond, r)

    network.__dict__["predict"] = predict  # in front of the class' own
    try:
        yield seen
    finally:
        del network.__dict__["predict"]
