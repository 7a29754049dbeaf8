"""Dual numbers through one stage: values and their tangents, by PyTorch's forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext
from flowanchor.jvp.attention import AttentionTangent, intercept
from flowanchor.jvp.compiled import eager_forwards
from flowanchor.jvp.replay import Recording, record, unrecorded
from flowanchor.jvp.stages import Stage, is_unit, through


class Moving(NamedTuple):
    """What passes from stage to stage: tokens [B, N, D] and the context, with their tangents (None: they stand)."""

    tokens: Tensor
    tokens_tangent: Tensor | None
    context: StageContext
    carried_tangents: tuple[Tensor | None, ...]


class Directions(NamedTuple):
    """The inputs of a network and the direction of the derivative: shapes as in `TangentEngine`."""

    x: Tensor
    t: Tensor
    cond: Any
    tangent_x: Tensor
    tangent_t: Tensor
    r: Tensor | None = None
    tangent_r: Tensor | None = None

    def check(self) -> None:
        """Raise `ConfigError` where a tangent does not fit its input."""
        if self.tangent_r is not None and self.r is None:
            raise ConfigError("A tangent of r was given without r: pass r, or leave tangent_r out.")
        pairs = {"x": (self.x, self.tangent_x), "t": (self.t, self.tangent_t), "r": (self.r, self.tangent_r)}
        for name, (primal, tangent) in pairs.items():
            if primal is not None and tangent is not None and primal.shape != tangent.shape:
                raise ConfigError(
                    f"A tangent of shape {tuple(tangent.shape)} was given for {name} of shape {tuple(primal.shape)}: "
                    "they must match."
                )


@contextmanager
def tangents(attention: AttentionTangent, recording: Recording | None = None) -> Iterator[None]:
    """A level of forward-mode AD in which attention has a tangent and compiled blocks run eagerly."""
    with forward_ad.dual_level(), eager_forwards(), record(recording), _LinearRule(), intercept(attention):
        yield


class _LinearRule(TorchFunctionMode):
    """The tangent of a linear layer whose weight stands: one product with the weight.

    PyTorch's own rule also multiplies the input by a weight tangent of zeros, a third product as large as the two.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    value, tangent = forward_ad.unpack_dual(input)
    if tangent is None or any(forward_ad.unpack_dual(p).tangent is not None for p in (weight, bias) if p is not None):
        return functional.linear(input, weight, bias)
    with torch.no_grad(), unrecorded():
        moved = functional.linear(tangent, weight)
    return forward_ad.make_dual(functional.linear(value, weight, bias), moved)


def embed_dual(stage: Stage, inputs: Directions, attention: AttentionTangent) -> Moving:
    """`embed` with tangents; gradient flows through the values where it is enabled, never through the tangents."""
    with tangents(attention):
        x, t = make(inputs.x, inputs.tangent_x), make(inputs.t, inputs.tangent_t)
        r = inputs.r if inputs.r is None else make(inputs.r, inputs.tangent_r)
        tokens, context = stage.call(x, t, inputs.cond, r)
        tokens, tokens_tangent = take(tokens)
        carried = [take(tensor) for tensor in context.carried]
    values = StageContext(tuple(value for value, _ in carried), context.fixed)
    return Moving(tokens, tokens_tangent, values, tuple(tangent for _, tangent in carried))


def stage_dual(
    stage: Stage, moving: Moving, attention: AttentionTangent, recording: Recording | None = None
) -> tuple[Tensor, Tensor | None]:
    """One later stage: tokens [B, N, D] (or the prediction [B, *]) and their tangent; values may be recorded."""
    tokens, tokens_tangent, context, carried_tangents = moving
    guard = _InputGuard(stage, (tokens, *context.carried))
    with tangents(attention, recording):
        carried = tuple(make(c, d) for c, d in zip(context.carried, carried_tangents, strict=True))
        out = stage.call(make(tokens, tokens_tangent), StageContext(carried, context.fixed))
        value, tangent = take(out)
    guard.check(value)
    return value, tangent


def make(value: Tensor, tangent: Tensor | None) -> Tensor:
    """A dual number; the plain value where there is no tangent, so that none is materialised."""
    return value if tangent is None else forward_ad.make_dual(value, tangent.to(value.dtype))


def take(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and detached tangent of a dual number; the value is the tensor itself, plain once its level has ended."""
    tangent = forward_ad.unpack_dual(dual).tangent
    return dual, None if tangent is None else tangent.detach()


class _InputGuard:
    """Notices a stage that changes its input in place or hands it on: the backward pass needs the input as it was."""

    def __init__(self, stage: Stage, inputs: tuple[Tensor, ...]) -> None:
        self.name = stage.name
        self.inputs = [(tensor, tensor._version) for tensor in inputs]

    def check(self, output: Tensor) -> None:
        for tensor, version in self.inputs:
            if tensor._version != version:
                raise ConfigError(
                    f"The stage {self.name} changes its input in place, which the backward pass still needs: "
                    "write a new tensor there (x = x + y instead of x += y)."
                )
            if output.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                raise ConfigError(
                    f"The stage {self.name} returns its input or a view of it: return a new tensor "
                    "(add .clone() to what it returns)."
                )


def run_network(backbone: Backbone, call: Callable[..., Any]) -> Any:
    """`call()` inside the root unit of a sharded network, plainly elsewhere."""
    return through([backbone] if is_unit(backbone) else [], call)
