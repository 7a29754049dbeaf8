"""Which graphs have been made of compiled blocks, and a block as a function of its parameters.

All blocks of a kind share a graph, whose inputs are the parameters. A graph belongs to the shapes, strides and types of
all inputs, to autocast, and to whatever else the block's Python code may read. What cannot be had so runs eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowanchor.errors import FlowAnchorError
from flowanchor.jvp.comparable import PLAIN, comparable
from flowanchor.jvp.compiled import CompiledForward, choices, is_compiled
from flowanchor.jvp.stages import Stage, is_unit, silenced

FORMS = 8  # graphs of one kind of block (shapes, what moves, precision); more of them run eagerly

Rebuild = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Stage, Any]]  # parameters, tensors -> stage, inputs
Graph = Callable[[list[Tensor], list[Tensor]], Any]  # parameters, tensors -> what a pass returns


@dataclass
class Pass:
    """A pass through a compiled block: what it does in words, and what makes a graph of it."""

    name: str
    make: Callable[[Rebuild, list[Tensor], list[Tensor], dict[str, Any]], Graph | None]  # ..., options of torch.compile
    kind: Hashable = None  # what it depends on beside the block and its inputs


@dataclass
class _Kind:
    """What has been made of blocks of one kind."""

    forms: dict[Any, Graph | None] = field(default_factory=dict)  # None: runs eagerly
    warned: bool = False

    def warn(self, stage: Stage, what: Pass, why: str) -> None:
        """Once."""
        if not self.warned:
            warnings.warn(
                f"The {what.name} of {stage.name} runs eagerly, as exact and slower, for it was not compiled: {why}.",
                stacklevel=2,
            )
        self.warned = True


_KINDS: dict[Any, _Kind] = {}
_CHANGING: WeakSet[nn.Module] = WeakSet()  # blocks that keep something, which a graph would not


def ask_graph(what: Pass, stage: Stage, inputs: Any, detached: bool) -> Any:
    """What a pass of a stage returns, by its graph; None where it has to run eagerly.

    It has to where a stage is not compiled, has hooks, or depends on what is no tensor and cannot be compared; where
    `what.make` refuses; and, after a warning, where the stage keeps something in attributes, or where tracing or
    compiling fails.

    Args:
        inputs: nested values, tensors among them.
        detached: whether no gradient is to flow through the graph.
    """
    if not is_compiled(stage.call) or stage.call in _CHANGING:
        return None
    block = _Block(cast(nn.Module, stage.call))
    leaves, structure = tree_flatten(inputs)
    if block.has_hooks() or not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return None
    others = tuple(None if isinstance(leaf, Tensor) else comparable(leaf) for leaf in leaves)
    parameters = list(block.tensors().values())
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if detached:
        parameters, tensors = ([tensor.detach() for tensor in some] for some in (parameters, tensors))
    device = tensors[0].device.type
    settings = block.settings()
    kind = _KINDS.setdefault((what.name, what.kind, settings, comparable(block.options)), _Kind())
    form = (
        str(structure), others, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
        tuple((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in (*parameters, *tensors)),
    )  # fmt: skip
    if form not in kind.forms:
        if len(kind.forms) >= FORMS:
            kind.warn(stage, what, f"it has met more than {FORMS} shapes or kinds of input")
            return None

        def rebuild(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Stage, Any]:
            rest = iter(tensors)
            given = tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in standing], structure)
            return stage._replace(call=block.called_with(parameters)), given

        standing = [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # none of the batch is kept
        made = _or_none(lambda: what.make(rebuild, parameters, tensors, block.options), what, stage, kind)
        kind.forms[form] = made
        if block.settings() != settings:
            _CHANGING.add(block.called)
            kind.warn(stage, what, "it changes attributes of its modules")
            return None
    graph = kind.forms[form]
    if graph is None:
        return None
    answer = _or_none(lambda: graph(parameters, tensors), what, stage, kind)
    if answer is None:
        kind.forms[form] = None
    return answer


_HOLE = torch.empty(0)  # stands for a tensor


def _or_none(call: Callable[[], Any], what: Pass, stage: Stage, kind: _Kind) -> Any:
    """What a call returns; None, and a warning, where it fails: compilers fail in many ways."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except FlowAnchorError:
        return None  # a fault of the stage, which the eager pass will name
    except Exception as error:  # noqa: BLE001
        kind.warn(stage, what, shorten(f"{type(error).__name__}, {error}", 300))
        return None


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
        """The block as a function, with these in the place of `tensors()`.

        It serves other blocks as well, in whose passes this one's sharding hooks would gather its own parameters and
        put them in the place of what was given.
        """
        replaced = dict(zip(self.tensors(), tensors, strict=True))
        units = [module for module in self.parts.modules() if is_unit(module)]

        def call(tokens: Tensor, context: Any) -> Tensor:
            with silenced(units):
                out: Tensor = torch.func.functional_call(self, replaced, (tokens, context))
            return out

        return call

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
