"""In which precision a network is asked while samples are drawn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import reduce

import torch

from flowanchor.interfaces import Backbone

LOW = (torch.bfloat16, torch.float16)


def state_dtype(backbone: Backbone) -> torch.dtype:
    """Of what the network is given: float32, also where its weights are stored in less; float64 where they are."""
    return reduce(torch.promote_types, {parameter.dtype for parameter in backbone.parameters()}, torch.float32)


def asking(backbone: Backbone, device: torch.device | str) -> AbstractContextManager[None]:
    """Autocast for a network that was loaded in a lower precision; nothing for others."""
    stored = {parameter.dtype for parameter in backbone.parameters()}
    low = next((dtype for dtype in LOW if dtype in stored), None)
    return torch.autocast(torch.device(device).type, low or LOW[0], enabled=low is not None)
