"""What a network may answer: one velocity per sample, of the sample's own shape, or the data that it stands for."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext, VelocityField

# Of networks that predict the data (JiT, arXiv 2511.13720): the least of `1 - t` that is divided by.
CLIP = 0.05


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


def known_prediction(predicts: str, network: Backbone, known: tuple[str, ...] = ("v", "x")) -> Literal["v", "x"]:
    """`predicts`, if it is one of `known`; raises `ConfigError` otherwise."""
    if predicts not in known:
        raise ConfigError(f"backbone.predicts={predicts}: {type(network).__name__} has {' or '.join(known)}.")
    return cast(Literal["v", "x"], predicts)


def clipped(t: Tensor) -> Tensor:
    """Times [B] -> `clip(1 - t, 0.05, 1)` [B]; a time beyond 1 means 2 - t, as the expanded interval tells it."""
    return (1 - t).abs().clamp(min=CLIP)  # never above 1, where a clamp's derivative would be lost at t = 0


def with_sample(context: StageContext, x: Tensor, t: Tensor) -> StageContext:
    """The context of a network that predicts the data, with what `from_data` needs: x_t [B, *] and t [B]."""
    return StageContext((*context.carried, x, t), context.fixed)


def from_data(data: Tensor, context: StageContext) -> Tensor:
    """Predicted data [B, *] -> the velocity `(data - x_t) / clip(1 - t, 0.05, 1)` [B, *], at the end of a head."""
    *_, x, t = context.carried
    return (data - x) / like(clipped(t), x)


def reached(t: Tensor) -> Tensor:
    """Times [B] -> the share [B] of a velocity that a network which predicts the data can answer.

    `(1 - t) / clip(1 - t, 0.05, 1)`: for a velocity v the data is `x_t + (1 - t) v`. 1 up to t = 0.95, 0 at 1.
    """
    return (1 - t).abs() / clipped(t)


def answerable(v: Tensor, t: Tensor, student: Backbone, source: VelocityField) -> Tensor:
    """Velocities [B, *] of `source` at times [B], as this student can answer them: of a network of velocities all."""
    return like(reached(t), v) * v if student.predicts == "x" and not source.clips(student) else v


def without_held(tangent: Tensor, t: Tensor, student: Backbone) -> Tensor:
    """Derivatives [B, *] at times [B], 0 where the clip of a network of data holds: an average that begins there is
    taken for the velocity at its start."""
    return torch.where(like(1 - t < CLIP, tangent), 0, tangent) if student.predicts == "x" else tangent
