"""How a network is told `r`, the time at which an average velocity ends (`backbone.end_time=`).

`auxiliary`: a second embedder is added to that of `t`; it is new, and silent at first. The two others need no silence:
they answer as the network of `t` alone does wherever `r = t`, whatever its weights are.

`decoupled` (DMF, arXiv 2510.24474): the first blocks are conditioned on `t`, the others and the head on `r`, both
through the embedder of `t`. `gated` (AnyFlow, arXiv 2605.13724): `(1 - g) e_t(t) + g e_r(r)`, where `e_r` starts as a
copy of `e_t`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flowanchor.errors import ConfigError

WAYS = ("auxiliary", "decoupled", "gated")
SHARE = 5 / 7  # of the blocks that are conditioned on t: 20 of 28, as published
GATE = 0.25  # as published


@dataclass(frozen=True)
class EndTime:
    """A way, checked.

    Args:
        way: `auxiliary`, `decoupled`, `gated`, or None for a network that is told no end.
        first: how many blocks are conditioned on `t`; all of them unless the network is `decoupled`.
        gate: `g` of `gated`.
    """

    way: str | None
    first: int
    gate: float

    @classmethod
    def of(cls, way: str | None, split: float | None, gate: float, depth: int, auxiliary: bool) -> EndTime:
        """From the settings of a backbone with `depth` blocks; raises `ConfigError` where they make no sense.

        `split`: a share of the blocks within (0, 1), a number of blocks, or None for 5 / 7 of them. `auxiliary`: the
        older name of `way="auxiliary"`.
        """
        if way is not None and way not in WAYS:
            raise ConfigError(f"backbone.end_time={way} is unknown: choose {', '.join(WAYS[:-1])} or {WAYS[-1]}.")
        if auxiliary and way not in (None, "auxiliary"):
            raise ConfigError(
                f"backbone.auxiliary_time_cond=true is backbone.end_time=auxiliary, not end_time={way}: leave one "
                "of them out."
            )
        if split is not None and way != "decoupled":
            raise ConfigError(
                f"backbone.end_time_split={split} divides the blocks of backbone.end_time=decoupled: leave it out."
            )
        if not 0 < gate < 1:
            raise ConfigError(f"backbone.end_time_gate={gate} must be between 0 and 1, for example {GATE}.")
        way = "auxiliary" if auxiliary else way
        return cls(way, _first(split, depth) if way == "decoupled" else depth, float(gate))

    @property
    def needs_embedder(self) -> bool:
        """Whether there is a second embedder."""
        return self.way in ("auxiliary", "gated")

    def meaning(self) -> dict[str, Any]:
        """What the weights of a second embedder mean (`Backbone.meaning`). Those of a decoupled network answer alike
        wherever `r = t`, however its blocks are divided: any network may start from them."""
        gate = {"end_time_gate": self.gate} if self.way == "gated" else {}
        return {"end_time": self.way, **gate} if self.needs_embedder else {}

    def embedded(self, at_t: Tensor, at_r: Tensor) -> Tensor:
        """What both embedders say, [B, D] each -> [B, D]; where they say the same, gated is exactly that."""
        return at_t + at_r if self.way == "auxiliary" else at_t + self.gate * (at_r - at_t)


def copy_values(of: nn.Module, into: nn.Module) -> None:
    """The parameters of one embedder into another. Not by a state dict, which a sharding unit replaces."""
    for target, value in zip(into.parameters(), of.parameters(), strict=True):
        target.data.copy_(value.data)


def _first(split: float | None, depth: int) -> int:
    """How many of the blocks are conditioned on t: one of them at least."""
    if split is None or 0 < split < 1:
        return max(1, round((SHARE if split is None else split) * depth))
    if not 1 <= split <= depth or split != int(split):
        raise ConfigError(
            f"backbone.end_time_split={split} is how many of the {depth} blocks, or which share of them, are "
            "conditioned on t: use for example 0.7, or null for 5/7."
        )
    return int(split)


def required(r: Tensor | None, network: object) -> Tensor:
    """`r`, or the reason why there must be one."""
    if r is None:
        raise ConfigError(
            f"This {type(network).__name__} embeds a second time: pass r (r = t asks for the instantaneous velocity)."
        )
    return r
