"""In which precision a network is asked while samples are drawn."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch

from flowanchor.interfaces import Backbone

LOW = (torch.bfloat16, torch.float16)


def state_dtype(backbone: Backbone) -> torch.dtype:
    """Of what the network is given: float32, also where its weights are stored in less; float64 where they are."""
    return reduce(torch.promote_types, {parameter.dtype for parameter in backbone.parameters()}, torch.float32)


def asking(backbone: Backbone, device: torch.device | str) -> AbstractContextManager[None]:
    """Autocast for a network that was loaded in a lower precision; others are asked in the precision around the call.

    A disabled autocast would be no substitute for nothing: it switches off one that a training run has around it.
    """
    stored = {parameter.dtype for parameter in backbone.parameters()}
    low = next((dtype for dtype in LOW if dtype in stored), None)
    return nullcontext() if low is None else torch.autocast(torch.device(device).type, low)
