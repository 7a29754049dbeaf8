"""What a network may answer: one velocity per sample, of the sample's own shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowanchor.errors import ConfigError


def as_velocity(answer: Any, x: Tensor, source: object) -> Tensor:
    """The answer [B, *] of `source` to samples `x` [B, *], if it is a floating-point tensor of their shape.

    Anything else would broadcast in a loss or in a sampler's step, and train or draw something else without a word.
    Raises `ConfigError` otherwise; nothing is computed.
    """
    if isinstance(answer, Tensor) and answer.shape == x.shape and answer.is_floating_point():
        return answer
    found = f"a {type(answer).__name__}"
    if isinstance(answer, Tensor):
        found = f"numbers of type {str(answer.dtype).removeprefix('torch.')} and of shape {tuple(answer.shape)}"
    raise ConfigError(
        f"{type(source).__name__} returned {found} for samples of shape {tuple(x.shape)}: let its last layer (a "
        "Backbone's head) return floating-point numbers of the samples' own shape."
    )
