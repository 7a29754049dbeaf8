"""Dual numbers through one stage: values and their tangents, by PyTorch's forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Answer, Backbone, Question, StageContext
from flowanchor.jvp.attention import AttentionTangent, intercept
from flowanchor.jvp.attention.intercept import autocast_of
from flowanchor.jvp.compiled import eager_forwards
from flowanchor.jvp.compiled_dual import compiled_dual
from flowanchor.jvp.inside import mapped, tensors_inside
from flowanchor.jvp.replay import Recording, record, unrecorded
from flowanchor.jvp.stages import Stage, ask, is_unit, through
from flowanchor.jvp.surroundings import Surroundings
from flowanchor.jvp.watch import watch


class Moving(NamedTuple):
    """What passes from stage to stage: tokens [B, N, D] and the context, with their tangents (None: they stand)."""

    tokens: Tensor
    tokens_tangent: Tensor | None
    context: StageContext
    carried_tangents: tuple[Tensor | None, ...]  # of the leaves of `context.carried`


class Directions(NamedTuple):
    """The inputs of a network and the direction of the derivative: shapes as in `Question`."""

    x: Tensor
    t: Tensor
    cond: Any
    tangent_x: Tensor
    tangent_t: Tensor
    r: Tensor | None = None
    tangent_r: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, cond: Any, question: Question) -> Directions:
        """A question that wants a tangent, about x [B, *] under a condition."""
        assert question.along is not None
        tangent_x, tangent_t, *tangent_r = question.along
        return cls(x, question.t, cond, tangent_x, tangent_t, question.r, *tangent_r)

    def check(self) -> None:
        """Raise `ConfigError` where a tangent does not fit its input."""
        if self.tangent_r is not None and self.r is None:
            raise ConfigError("A tangent of r was given without r: pass r, or leave it out of along.")
        pairs = {"x": (self.x, self.tangent_x), "t": (self.t, self.tangent_t), "r": (self.r, self.tangent_r)}
        for name, (primal, tangent) in pairs.items():
            if primal is not None and tangent is not None and primal.shape != tangent.shape:
                raise ConfigError(
                    f"A tangent of shape {tuple(tangent.shape)} was given for {name} of shape {tuple(primal.shape)}: "
                    "they must match."
                )


def one_by_one(
    dual: Callable[[Backbone, Directions], Answer],
    backbone: Backbone,
    x: Tensor,
    cond: Any,
    questions: Sequence[Question],
) -> list[Answer]:
    """The answers of an engine whose walk has one question: an ordinary prediction where no tangent is wanted."""
    return [
        Answer(ask(backbone, x, question.t, cond, question.r))
        if question.along is None
        else dual(backbone, Directions.of(x, cond, question))
        for question in questions
    ]


@contextmanager
def tangents(attention: AttentionTangent, recording: Recording | None = None) -> Iterator[None]:
    """A level of forward-mode AD in which attention has a tangent and compiled blocks run eagerly."""
    with forward_ad.dual_level(), eager_forwards(), record(recording), _StandingRules(), intercept(attention):
        yield


class _StandingRules(TorchFunctionMode):
    """The tangents of functions of which one operand stands, by what is left of PyTorch's own rules.

    Those go on with a tangent of zeros. For a linear layer that is a third product as large as the two others, of the
    input with zeros; for products and sums it is a tensor that holds nothing and is added and multiplied in Python.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func in _RULES and len(args) == 2 and not kwargs:
            tangents = [_tangent(operand) for operand in args]
            if sum(tangent is not None for tangent in tangents) == 1:
                return _RULES[func](func, args, tangents)
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    value, tangent = forward_ad.unpack_dual(input)
    if tangent is None or any(forward_ad.unpack_dual(p).tangent is not None for p in (weight, bias) if p is not None):
        return functional.linear(input, weight, bias)
    weight = autocast_of(weight)  # once for both products
    with torch.no_grad(), unrecorded():
        moved = functional.linear(tangent, weight)
    return forward_ad.make_dual(functional.linear(value, weight, bias), moved)


def _product(func: Callable[..., Tensor], operands: Sequence[Any], tangents: Sequence[Tensor | None]) -> Tensor:
    first, second = map(_value, operands)
    with torch.no_grad():
        moved = func(*((tangents[0], second) if tangents[1] is None else (first, tangents[1])))
    return forward_ad.make_dual(func(first, second), moved)


def _sum(func: Callable[..., Tensor], operands: Sequence[Any], tangents: Sequence[Tensor | None]) -> Tensor:
    out = func(*map(_value, operands))
    with torch.no_grad():
        (tangent,) = (tangent for tangent in tangents if tangent is not None)
        moved = torch.empty_like(out).copy_(tangent)
    return forward_ad.make_dual(out, moved)


_RULES = {torch.mul: _product, Tensor.mul: _product, torch.add: _sum, Tensor.add: _sum}


def _tangent(operand: Any) -> Tensor | None:
    return forward_ad.unpack_dual(operand).tangent if isinstance(operand, Tensor) else None


def _value(operand: Any) -> Any:
    return forward_ad.unpack_dual(operand).primal if isinstance(operand, Tensor) else operand


def embed_dual(stage: Stage, inputs: Directions, attention: AttentionTangent) -> Moving:
    """`embed` with tangents; gradient flows through the values where it is enabled, never through the tangents."""

    def call(given: Sequence[Tensor]) -> tuple[Tensor, StageContext]:
        r = given[2] if len(given) > 2 else None
        return _embedded(stage, stage.call(given[0], given[1], inputs.cond, r))

    moving: list[tuple[Tensor, Tensor | None]] = [(inputs.x, inputs.tangent_x), (inputs.t, inputs.tangent_t)]
    if inputs.r is not None:
        moving.append((inputs.r, inputs.tangent_r))
    (tokens, context), (tokens_tangent, *carried_tangents) = _dual_pass(stage, call, moving, attention)
    return Moving(tokens, tokens_tangent, context, tuple(carried_tangents))


def stage_dual(
    stage: Stage, moving: Moving, attention: AttentionTangent, recording: Recording | None = None
) -> tuple[Tensor, Tensor | None]:
    """One later stage: tokens [B, N, D] (or the prediction [B, *]) and their tangent; values may be recorded."""
    # The first walk is watched, call by call of PyTorch.
    found = None if watch() is not None else compiled_dual(_eager_dual, stage, moving, attention, recording)
    return _eager_dual(stage, moving, attention, recording) if found is None else found


def _eager_dual(
    stage: Stage, moving: Moving, attention: AttentionTangent, recording: Recording | None
) -> tuple[Tensor, Tensor | None]:
    carried, fixed = moving.context
    inputs = [moving.tokens, *tree_leaves(carried)]
    guard = _InputGuard(stage, inputs)

    def call(given: Sequence[Tensor]) -> tuple[Tensor, StageContext]:
        rest = iter(given[1:])
        out = stage.call(given[0], StageContext(mapped(lambda _: next(rest), carried), fixed))
        if not isinstance(out, Tensor):
            raise ConfigError(f"The stage {stage.name} returned {_kind(out)}: return a tensor alone.")
        return out, StageContext(())

    pairs = list(zip(inputs, (moving.tokens_tangent, *moving.carried_tangents), strict=True))
    (value, _), (tangent,) = _dual_pass(stage, call, pairs, attention, recording)
    guard.check(value)
    return value, tangent


def _dual_pass(
    stage: Stage,
    call: Callable[[Sequence[Tensor]], tuple[Tensor, StageContext]],
    moving: Sequence[tuple[Tensor, Tensor | None]],
    attention: AttentionTangent,
    recording: Recording | None = None,
) -> tuple[tuple[Tensor, StageContext], list[Tensor | None]]:
    """`call` with its inputs as dual numbers: what it returned, and the tangents of its tokens and of `carried`."""
    watching = watch()
    before = None if watching is None else Surroundings.here(moving[0][0].device, others=True)
    with tangents(attention, recording):
        duals = [make(value, tangent) for value, tangent in moving]
        with nullcontext() if watching is None else watching.calls(stage.name, duals):
            tokens, context = call(duals)
        for way, tensor in tensors_inside(context.fixed):
            if take(tensor)[1] is not None:
                raise ConfigError(
                    f"The stage {stage.name} puts a tensor that depends on x or a time into StageContext.fixed, where "
                    f"its derivative is lost (fixed{way}, of shape {tuple(tensor.shape)}): put it into carried, or "
                    "detach() it if it is meant as a constant."
                )
        found = [take(tensor)[1] for tensor in (tokens, *tree_leaves(context.carried))]
    if watching is not None and before is not None:
        watching.check_still(stage.name, before, call, moving, found)
    return (tokens, context), found


def make(value: Tensor, tangent: Tensor | None) -> Tensor:
    """A dual number; the plain value where there is no tangent, so that none is materialised."""
    return value if tangent is None else forward_ad.make_dual(value, tangent.to(value.dtype))


def still_or(tangent: Tensor | None, value: Tensor) -> Tensor:
    """The tangent of a prediction; zeros where nothing that moves enters it."""
    return torch.zeros_like(value) if tangent is None else tangent


def take(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and detached tangent of a dual number; the value is the tensor itself, plain once its level has ended."""
    tangent = forward_ad.unpack_dual(dual).tangent
    return dual, None if tangent is None else tangent.detach()


def _embedded(stage: Stage, found: Any) -> tuple[Tensor, StageContext]:
    """What `embed` returned, if it is what `Backbone.embed` promises."""
    tokens, context = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(tokens, Tensor) or not isinstance(context, StageContext):
        raise ConfigError(
            f"The stage {stage.name} returned {_kind(found)}: return the tokens and a StageContext(carried, fixed)."
        )
    for leaf in tree_leaves(context.carried):
        if not isinstance(leaf, Tensor):
            raise ConfigError(
                f"The stage {stage.name} puts {_kind(leaf)} into StageContext.carried, where every value has a "
                "derivative: tensors belong there, and everything else into fixed."
            )
    return tokens, context


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return f"a value of type {type(value).__name__}"


class _InputGuard:
    """Notices a stage that changes its input in place or hands it on: the backward pass needs the input as it was."""

    def __init__(self, stage: Stage, inputs: Sequence[Tensor]) -> None:
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


def run_network(backbone: Backbone, call: Callable[..., Any], *inputs: Any) -> Any:
    """`call(*inputs)` inside the root unit of a sharded network, plainly elsewhere.

    `inputs` are what the network is asked: on GPUs FSDP2 moves those of the root to its device, and takes it for
    granted that there are some (before torch 2.14).
    """
    return through([backbone] if is_unit(backbone) else [], call, *inputs)
