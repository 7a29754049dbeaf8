"""Any module of one's own as a network to train, where an engine needs no stages (`Full`, `FiniteDifference`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from flowanchor.conditioning import Classes, NoCondition
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext


class PlainNetwork(Backbone):
    """`network(x, t, cond)`, or `network(x, t, cond, r)` with a second time, as a `Backbone` without stages.

    Args:
        network: samples x [B, *], times t [B] in [0, 2] (1 to 2 under the expanded interval), labels [B] (int64) or
            None -> velocities [B, *].
        sample_shape: of one sample, without the batch.
        classes: how many it is conditioned on; 0: none, and it is called with `cond=None`.
        null: whether it knows label `classes` as no class, for guidance.
        dropout: share of the labels that training replaces by that one.
        takes_end_time: whether it takes `r` [B], the time at which an average ends.
    """

    def __init__(
        self,
        network: nn.Module,
        sample_shape: Sequence[int],
        classes: int = 0,
        null: bool = False,
        dropout: float = 0.0,
        takes_end_time: bool = False,
    ) -> None:
        super().__init__()
        if dropout and not null:
            raise ConfigError(
                f"dropout={dropout} needs a label for no class: set null=True, and have one embedding more."
            )
        self.network = network
        self.blocks = nn.ModuleList()
        self.sample_shape = tuple(sample_shape)
        self.takes_end_time = takes_end_time
        self.conditioning = Classes(classes, null, dropout) if classes else NoCondition()

    def predict(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        found: Tensor = self.network(x, t, cond, r) if self.takes_end_time else self.network(x, t, cond)
        return found

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        self._refuse()

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"{type(self.network).__name__} is no chain of stages: train it with engine=Full() (jvp=full), or make it "
            "a Backbone (docs/add_a_backbone.md)."
        )
