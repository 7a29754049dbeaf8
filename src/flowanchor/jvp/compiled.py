"""`torch.compile` for the blocks of a backbone, in a way that tangent engines can step around.

Compiled code has no forward-mode rule, so tangent passes go around it, by graphs of their own (`compiled_dual`). All
other passes (teacher, anchor, recomputation in the backward) run a block compiled. Only `forward` is compiled: hooks of
sharding units stay outside, also those of units inside a block (modules that stay in float32), which then are whole as
long as the block runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from flowanchor.interfaces import Backbone
from flowanchor.jvp.stages import is_unit, through

_EAGER: ContextVar[bool] = ContextVar("eager_forwards", default=False)


class CompiledForward:
    """A block's forward, compiled on first use; eager inside `eager_forwards`."""

    def __init__(self, block: nn.Module, **options: Any) -> None:
        self.block, self.eager, self.options = block, block.forward, options
        self.compiled = torch.compile(self.eager, **options)

    def __call__(self, *inputs: Any) -> Any:
        if runs_eagerly():
            return self.eager(*inputs)
        return through(self._inner_units(), self.compiled, *inputs)

    def _inner_units(self) -> list[nn.Module]:
        """The sharding units inside the block; none where their hooks are silent because an engine keeps them whole."""
        units = [module for module in self.block.modules() if module is not self.block and is_unit(module)]
        return [unit for unit in units if unit._forward_pre_hooks]


def compile_blocks(backbone: Backbone, **options: Any) -> None:
    """Compile the forward of each block; `options` are those of `torch.compile`. Keys of the state dict stay.

    A block that asks one of several modules names them in `choices`; then these are compiled.
    """
    for block in backbone.blocks:
        for module in choices(block):
            if not is_compiled(module):
                module.__dict__["forward"] = CompiledForward(module, **options)


def is_compiled(block: Any) -> bool:
    """Whether this is a block where `compile_blocks` has been."""
    chosen = choices(block)[0]
    return isinstance(getattr(chosen, "__dict__", {}).get("forward"), CompiledForward)


def choices(block: Any) -> Sequence[Any]:
    """The modules that a block asks one of: itself, where it names none."""
    found: Sequence[Any] = getattr(block, "choices", (block,))
    return found


@contextmanager
def eager_forwards() -> Iterator[None]:
    """Inside, compiled blocks run eagerly."""
    token = _EAGER.set(True)
    try:
        yield
    finally:
        _EAGER.reset(token)


def runs_eagerly() -> bool:
    """Whether compiled blocks run eagerly here."""
    return _EAGER.get()
