"""A backbone seen as a chain of stages, and how an engine calls one of them, sharded or not.

A stage of a sharded network is a unit of FSDP2 (`fully_shard`): its parameters are whole only between the hooks around
the unit's `__call__`. `through` runs any function between those hooks, so that an engine may do in a stage what it
likes, and no layer has to know of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from flowanchor.base.shards import is_sharded as is_sharded
from flowanchor.base.shards import is_unit as is_unit
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone


class Stage(NamedTuple):
    """One link of the chain."""

    name: str  # for messages
    call: Callable[..., Any]  # `embed(x, t, cond, r)`, or `(tokens, context) -> tokens`
    modules: list[nn.Module]  # what it calls, with the backbone itself where that has parameters of its own
    units: list[nn.Module]  # the sharding units that it runs in, outermost first; none where it is not sharded

    def parameters(self) -> list[nn.Parameter]:
        """Its trainable parameters; of a sharded stage they are whole between the hooks of its units only."""
        found = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
        return list(found.values())


class _OwnParameters(nn.Module):
    """The parameters that a backbone holds itself (a table, a last modulation), looked up anew at each call."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.__dict__["backbone"].parameters(recurse=False)


class UnitMethod:
    """`embed` or `head` of a sharded backbone: the method between the hooks of the units that it calls."""

    def __init__(self, function: Callable[..., Any], units: Sequence[nn.Module]) -> None:
        self.function, self.units = function, list(units)

    def __call__(self, *inputs: Any) -> Any:
        return through(self.units, self.function, *inputs)


def ask(network: nn.Module, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
    """`F(x, t, r)` for exactly this condition: `predict` of a Backbone; any other module is called, with `r` if given.

    This is all that an engine without stages needs of a network.
    """
    more = () if r is None else (r,)
    answer = network.predict(x, t, cond, r) if isinstance(network, Backbone) else network(x, t, cond, *more)
    if isinstance(answer, Tensor):
        return answer
    raise ConfigError(
        f"{type(network).__name__} returned a value of type {type(answer).__name__}: return the velocity alone, a "
        "tensor."
    )


def check_stages(backbone: Any) -> None:
    """Raise `ConfigError` for a network that is no chain of stages."""
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(backbone, Backbone) or not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise ConfigError(
            f"{type(backbone).__name__} is no chain of stages, which jvp=chain and jvp=two_pass walk along: make it a "
            "Backbone with embed, a non-empty ModuleList blocks, and head, or use jvp=full on unsharded devices, which "
            "takes any module that is called with (x, t, cond)."
        )


def stages(backbone: Backbone) -> tuple[Stage, list[Stage]]:
    """`embed`, and the links after it: each of the blocks, and the head."""
    check_stages(backbone)
    modules = backbone.stage_modules()
    own = [_OwnParameters(backbone)]
    embed = _stage("embed", backbone.embed, modules[0], own)
    blocks = [
        _stage(f"blocks.{index} ({type(block).__name__})", block, modules[1 + index], own)
        for index, block in enumerate(backbone.blocks)
    ]
    return embed, [*blocks, _stage("head", backbone.head, modules[-1], own)]


def _stage(name: str, call: Callable[..., Any], modules: Sequence[nn.Module], own: list[Any]) -> Stage:
    units = [inner for module in modules for inner in module.modules() if is_unit(inner)]
    if isinstance(call, UnitMethod):
        call = call.function
    return Stage(name, call, [*modules, *own], units)


def through(units: Sequence[nn.Module], function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` with every unit whole: called inside the forward hooks of all units, outermost first.

    The hooks see `inputs` and what the function returns as input and output of the unit: from the tensors among them
    that need gradient FSDP2 learns when to gather and when to reduce in the backward pass. Inside, the hooks of these
    units are silent, so that the function may call the modules as they are.
    """
    run = partial(_silently, units, function)
    for unit in reversed(units):
        run = partial(_inside, unit, run)
    return run(*inputs)


def _inside(unit: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a module with `function` in the place of its forward, once."""
    own = unit.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            unit.__dict__.pop("forward", None)
        else:
            unit.__dict__["forward"] = own

    def forward(*inputs: Any) -> Any:
        restore()
        return function(*inputs)

    unit.__dict__["forward"] = forward
    try:
        return unit(*inputs)
    finally:
        restore()


def _silently(units: Sequence[nn.Module], function: Callable[..., Any], *inputs: Any) -> Any:
    with silenced(units):
        return function(*inputs)


@contextmanager
def silenced(units: Sequence[nn.Module]) -> Iterator[None]:
    """Calls of these modules run without their forward hooks."""
    hooks = [(unit, unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
    for unit in units:
        unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for unit, before, after in hooks:
            unit._forward_pre_hooks, unit._forward_hooks = before, after
