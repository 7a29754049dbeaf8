"""The dual pass of a compiled block as one compiled graph (`compile=true`).

Compiled code has no forward-mode rule, but the pass through a block in which values and tangents go together is itself
an ordinary function. `stage_dual` is traced once with fake tensors, parameters as its inputs, so that one graph serves
all blocks of a network; attention stays one operator in it. Whatever cannot be traced or compiled runs eagerly.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, cast
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowanchor.errors import FlowAnchorError
from flowanchor.jvp.attention import AttentionTangent
from flowanchor.jvp.attention.base import wide
from flowanchor.jvp.attention.operator import Opaque, number
from flowanchor.jvp.comparable import PLAIN, comparable
from flowanchor.jvp.compiled import CompiledForward, choices, is_compiled
from flowanchor.jvp.replay import Recording
from flowanchor.jvp.stages import Stage

FORMS = 8  # graphs of one kind of block (shapes, what moves, precision); more of them run eagerly

Pass = Callable[..., tuple[Tensor, Tensor | None]]
Graph = Callable[..., tuple[Tensor, Tensor | None, list[Tensor]]]


@dataclass
class _Kind:
    """What has been made of blocks of one kind."""

    forms: dict[Any, Graph | None] = field(default_factory=dict)  # None: runs eagerly
    warned: bool = False

    def warn(self, stage: Stage, why: str) -> None:
        """Once."""
        if not self.warned:
            warnings.warn(
                f"The tangent pass of {stage.name} runs eagerly, as exact and slower, for it was not compiled: {why}.",
                stacklevel=2,
            )
        self.warned = True


_KINDS: dict[Any, _Kind] = {}
_CHANGING: WeakSet[nn.Module] = WeakSet()  # blocks that keep something, which a graph would not


def compiled_dual(
    eager: Pass, stage: Stage, moving: Any, attention: AttentionTangent, recording: Recording | None
) -> tuple[Tensor, Tensor | None] | None:
    """What `eager(stage, moving, attention, recording)` returns, by a compiled graph; None where it has to run itself.

    It has to where a stage is not compiled, draws random numbers (compiled code draws others), has hooks, or depends
    on what is no tensor and cannot be compared; and, after a warning, where it keeps something in attributes, or where
    tracing or compiling fails.
    """
    if not is_compiled(stage.call) or torch.is_grad_enabled() or stage.call in _CHANGING:
        return None
    block = _Block(cast(nn.Module, stage.call))
    leaves, structure = tree_flatten(tuple(moving))
    if block.has_hooks() or not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return None
    others = tuple(None if isinstance(leaf, Tensor) else comparable(leaf) for leaf in leaves)
    parameters = [p.detach() for p in block.tensors().values()]
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    device = moving.tokens.device.type
    settings = block.settings()
    kind = _KINDS.setdefault((settings, number(attention), comparable(block.options)), _Kind())
    form = (
        str(structure), others, recording is None, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
        tuple((x.shape, x.stride(), x.dtype, x.device) for x in (*parameters, *tensors)),
    )  # fmt: skip
    if form not in kind.forms:
        if len(kind.forms) >= FORMS:
            kind.warn(stage, f"it has met more than {FORMS} shapes or kinds of input")
            return None

        def dual(parameters: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
            rest = iter(tensors)
            state = tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
            linears = None if recording is None else Recording()
            called = stage._replace(call=block.called_with(parameters))
            value, tangent = eager(called, type(moving)(*state), Opaque(attention), linears)
            return value, tangent, [] if linears is None else linears.outputs

        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        kind.forms[form] = _or_none(lambda: _traced(dual, parameters, tensors, block.options, autocast), stage, kind)
        if block.settings() != settings:
            _CHANGING.add(block.called)
            kind.warn(stage, "it changes attributes of its modules")
            return None
    graph = kind.forms[form]
    if graph is None:
        return None
    # The casts of autocast are in the graph already.
    with torch.no_grad(), torch.autocast(device, enabled=False):
        answer = _or_none(lambda: graph(parameters, tensors), stage, kind)
    if answer is None:
        kind.forms[form] = None
        return None
    value, tangent, linears = answer
    if recording is not None:
        recording.outputs += linears
    return value, tangent


def _or_none(call: Callable[[], Any], stage: Stage, kind: _Kind) -> Any:
    """What a call returns; None, and a warning, where it fails: compilers fail in many ways."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except FlowAnchorError:
        return None  # a fault of the stage, which the eager pass will name
    except Exception as error:  # noqa: BLE001
        kind.warn(stage, shorten(f"{type(error).__name__}, {error}", 300))
        return None


def _traced(
    dual: Graph, parameters: list[Tensor], tensors: list[Tensor], options: dict[str, Any], autocast: torch.autocast
) -> Graph | None:
    """The pass as a graph that is compiled when it is first called; None where random numbers are drawn."""

    def trace() -> GraphModule:
        with torch.no_grad(), autocast, _Traceable():
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
    compiled: Graph = torch.compile(graph, **{**options, "fullgraph": True, "dynamic": False})
    return compiled


class _Traceable(TorchFunctionMode):
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


# --------------------------------------------------------------------------------------------------- the block


class _Block(nn.Module):
    """A compiled block, or the several modules that it asks, as one module that can be called with other parameters."""

    called: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["called"] = block
        self.parts = nn.ModuleList(choices(block))

    @property
    def options(self) -> dict[str, Any]:
        """Those of `torch.compile`."""
        found = self.parts[0].__dict__["forward"]
        assert isinstance(found, CompiledForward)
        return found.options

    def forward(self, tokens: Tensor, context: Any) -> Tensor:
        out: Tensor = self.called(tokens, context)
        return out

    def has_hooks(self) -> bool:
        """Whether anything else sees its calls; the hooks of sharding units are silent here."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.parts.modules())

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def called_with(self, tensors: Sequence[Tensor]) -> Callable[[Tensor, Any], Tensor]:
        """The block as a function, with these in the place of `tensors()`."""
        replaced = dict(zip(self.tensors(), tensors, strict=True))
        return lambda tokens, context: torch.func.functional_call(self, replaced, (tokens, context))

    def settings(self) -> Any:
        """All that the block's Python code may read beside tensors: kinds, modes and attributes of its modules."""
        return type(self.called), tuple((name, _settings(module)) for name, module in self.parts.named_modules())


_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_SHARDING = "composable_api"  # in the names under which FSDP2 keeps its state of a unit


def _settings(module: nn.Module) -> Any:
    own = (
        (name, comparable(value))
        for name, value in vars(module).items()
        if name not in _INTERNAL and _SHARDING not in name and not isinstance(value, CompiledForward)
    )
    return type(module), tuple(own)
