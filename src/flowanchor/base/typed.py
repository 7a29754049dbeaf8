"""What a user typed, built: the one place where Hydra instantiates. What a file says goes through `trusted`."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate

from flowanchor.errors import FlowAnchorError


def instantiate(settings: Any, **options: Any) -> Any:
    """`hydra.utils.instantiate`; an error of ours that a class raises comes out as it is, not in Hydra's wrapper."""
    try:
        return hydra_instantiate(settings, **options)
    except InstantiationException as wrapped:
        link: BaseException | None = wrapped
        while link is not None and not isinstance(link, FlowAnchorError):
            link = link.__cause__
        if link is None:
            raise
    raise link  # outside of the handler, whose exception holds it as its cause
