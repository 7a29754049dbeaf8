"""The dual pass of a compiled block as one compiled graph (`compile=true`).

Compiled code has no forward-mode rule, but the pass through a block in which values and tangents go together is itself
an ordinary function. `stage_dual` is traced once with fake tensors, parameters as its inputs, so that one graph serves
all blocks of a network; attention stays one operator in it. Whatever cannot be traced or compiled runs eagerly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowanchor.jvp.attention import AttentionTangent
from flowanchor.jvp.attention.base import wide
from flowanchor.jvp.attention.operator import Opaque, number
from flowanchor.jvp.compiled_forms import Graph, Pass, Rebuild, ask_graph
from flowanchor.jvp.replay import Recording
from flowanchor.jvp.stages import Stage

Dual = Callable[..., tuple[Tensor, Tensor | None]]
Traced = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor | None, list[Tensor]]]


def compiled_dual(
    eager: Dual, stage: Stage, moving: Any, attention: AttentionTangent, recording: Recording | None
) -> tuple[Tensor, Tensor | None] | None:
    """What `eager(stage, moving, attention, recording)` returns, by a compiled graph; None where it has to run itself.

    It has to where there is no graph (`ask_graph`), and where a stage draws random numbers: compiled code draws others.
    """
    if torch.is_grad_enabled():
        return None
    device = moving.tokens.device.type
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def make(
        rebuild: Rebuild, parameters: list[Tensor], tensors: list[Tensor], options: dict[str, Any]
    ) -> Graph | None:
        def dual(parameters: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
            called, state = rebuild(parameters, tensors)
            linears = None if recording is None else Recording()
            value, tangent = eager(called, type(moving)(*state), Opaque(attention), linears)
            return value, tangent, [] if linears is None else linears.outputs

        graph = _traced(dual, parameters, tensors, options, autocast)
        if graph is None:
            return None

        def run(parameters: list[Tensor], tensors: list[Tensor]) -> Any:
            # The casts of autocast are in the graph already.
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return graph(parameters, tensors)

        return run

    what = Pass("tangent pass", make, (number(attention), recording is None))
    answer = ask_graph(what, stage, tuple(moving), detached=True)
    if answer is None:
        return None
    value, tangent, linears = answer
    if recording is not None:
        recording.outputs += linears
    return value, tangent


def _traced(
    dual: Traced, parameters: list[Tensor], tensors: list[Tensor], options: dict[str, Any], autocast: torch.autocast
) -> Traced | None:
    """The pass as a graph that is compiled when it is first called; None where random numbers are drawn."""

    def trace() -> GraphModule:
        with torch.no_grad(), autocast, Traceable():
            return make_fx(dual, tracing_mode="fake")(parameters, tensors)

    before = random.getstate(), np.random.get_state()
    try:
        # In a thread of its own, which modes around this pass do not reach. And an error within forward-mode AD leaves
        # the dispatcher of its thread in a state in which no dual number can be made any more.
        with ThreadPoolExecutor(1) as thread:
            graph = thread.submit(copy_context().run, trace).result()
        if _draws(graph) or _has_drawn(before):
            return None
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    _check_inputs(graph)
    graph.graph.eliminate_dead_code()  # forward-mode AD leaves comparisons of sizes behind, which nobody reads
    graph.recompile()
    compiled: Traced = torch.compile(graph, **{**options, "fullgraph": True, "dynamic": False})
    return compiled


class Traceable(TorchFunctionMode):
    """What has a forward-mode rule that cannot be traced, in operators that can."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """In float32 or better, weight and bias after it, as in the fused one; of the same type as that."""
    dtype = functional.layer_norm(input.detach(), normalized_shape, weight, bias, eps).dtype  # dead code
    out = functional.layer_norm(wide(input), normalized_shape, None, None, eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(dtype)


def _draws(graph: GraphModule) -> bool:
    """Whether it draws random numbers."""
    tags = (getattr(node.target, "tags", ()) for node in graph.graph.nodes if node.op == "call_function")
    return any(torch.Tag.nondeterministic_seeded in found for found in tags)


def _has_drawn(before: tuple[Any, Any]) -> bool:
    """Whether Python's or numpy's random numbers have been drawn since: they would be constants of the graph."""
    now = np.random.get_state()
    same = all(np.array_equal(a, b) for a, b in zip(now, before[1], strict=True))
    return not same or random.getstate() != before[0]


def _check_inputs(graph: GraphModule) -> None:
    """A tensor that is neither parameter, buffer nor input would be the first block's for all of them."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            held = getattr(graph, node.target)
            raise TypeError(f"it uses a tensor of shape {tuple(held.shape)} that is no parameter, buffer or input")
