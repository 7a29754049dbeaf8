"""Passes that record the outputs of linear layers, and passes that use them, compiled (`compile=true`).

`selective` and `false` of Chain's `recompute` differentiate a stage whose linear layers are known. Which those are is
seen as the stage runs (`replay`), which the compiler's own tracer does not follow; so it takes the pass as one
operation, and autograd's tracer looks into it. Forward and backward then are a pair of graphs, as of any compiled code.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from flowanchor.interfaces import StageContext
from flowanchor.jvp.compiled import runs_eagerly
from flowanchor.jvp.compiled_forms import Graph, Pass, Rebuild, ask_graph
from flowanchor.jvp.replay import Recording, record, replay
from flowanchor.jvp.stages import Stage


def recorded(stage: Stage, tokens: Tensor, context: StageContext, recording: Recording | None) -> Tensor:
    """An ordinary pass without gradient; the outputs of its linear layers go into the recording, if there is one."""
    if recording is None:
        return cast(Tensor, stage.call(tokens, context))
    answer = None if runs_eagerly() else ask_graph(_RECORDED, stage, (tokens, context), detached=True)
    if answer is None:
        with record(recording):
            return cast(Tensor, stage.call(tokens, context))
    value, *outputs = answer
    recording.outputs += outputs
    return cast(Tensor, value)


def replayed(stage: Stage, tokens: Tensor, context: StageContext, recording: Recording | None) -> Tensor:
    """An ordinary pass with gradient, whose linear layers return what was recorded; the recording is used up.

    Whoever calls it sees to `eager_forwards` where random numbers are drawn: compiled code draws others.
    """
    if recording is None:
        return cast(Tensor, stage.call(tokens, context))
    if recording.outputs and not runs_eagerly():
        answer = ask_graph(_REPLAYED, stage, (tokens, context, tuple(recording.outputs)), detached=False)
        if answer is not None:
            recording.outputs = []
            return cast(Tensor, answer)
    with replay(recording):
        return cast(Tensor, stage.call(tokens, context))


def _make_recorded(
    rebuild: Rebuild, parameters: list[Tensor], tensors: list[Tensor], options: dict[str, Any]
) -> Graph | None:
    def run(parameters: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        called, given = rebuild(parameters, tensors)
        linears = Recording()
        with record(linears):
            value = called.call(*given)
        return value, *linears.outputs

    return _compiled(run, options)


def _make_replayed(
    rebuild: Rebuild, parameters: list[Tensor], tensors: list[Tensor], options: dict[str, Any]
) -> Graph | None:
    def run(parameters: list[Tensor], tensors: list[Tensor]) -> Tensor:
        called, (tokens, context, outputs) = rebuild(parameters, tensors)
        with replay(Recording(outputs)):
            # What is known of a last linear layer is an input of the graph: as a view of it the value would have no
            # gradient.
            return cast(Tensor, called.call(tokens, context)).clone()

    return _compiled(run, options)


_RECORDED, _REPLAYED = Pass("recorded pass", _make_recorded), Pass("recomputation", _make_replayed)


def _compiled(run: Graph, options: dict[str, Any]) -> Graph:
    whole = torch.compiler.allow_in_graph(run)

    def call(parameters: list[Tensor], tensors: list[Tensor]) -> Any:
        return whole(parameters, tensors)

    # What has been compiled is counted by code object, and only so many are kept of one.
    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    graph = torch.compile(own, **{**options, "fullgraph": True, "dynamic": False})
    return cast(Graph, graph)
