"""What a strategy of Lightning may be able to do besides, and what every other one does instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only asks must not import Lightning
    import lightning.pytorch as pl


class Abilities:
    """A base class for strategies beside Lightning's own; as it stands, of those that leave the networks alone."""

    deferred_initialisation: bool = False  # whether networks may come without values (flowanchor.deferred)
    allows_graphs: bool = False  # whether a training step may be a CUDA graph though there are several processes
    shards: bool = False  # whether it spreads the networks over the processes

    def check_precision(self, precision: Any) -> None:  # noqa: B027
        """Raise `ConfigError` for a `trainer.precision` that it cannot train in."""

    def parallelise(self, module: pl.LightningModule) -> None:  # noqa: B027
        """Spread the networks of a module over the processes; what is spread already stays as it is."""


def abilities(strategy: Any) -> Abilities:
    """Those of a strategy: its own, or none."""
    return strategy if isinstance(strategy, Abilities) else Abilities()
