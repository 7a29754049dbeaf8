"""How a run is spread over processes (`strategy=`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowanchor.strategies.chain_jvp import ChainJVPStrategy

__all__ = ["ChainJVPStrategy"]


def __getattr__(name: str) -> Any:
    """`ChainJVPStrategy`, imported when it is asked for: `shard_backbone` must not need Lightning."""
    if name == "ChainJVPStrategy":
        from flowanchor.strategies.chain_jvp import ChainJVPStrategy

        return ChainJVPStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
