"""`torch.compile` for the blocks of a backbone, in a way that tangent engines can step around.

Compiled code has no forward-mode rule, so tangent passes run a block eagerly, and all other passes (teacher, anchor,
recomputation in the backward) run it compiled. Only `forward` is compiled: hooks of sharding units stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from flowanchor.interfaces import Backbone

_EAGER: ContextVar[bool] = ContextVar("eager_forwards", default=False)


class CompiledForward:
    """A block's forward, compiled on first use; eager inside `eager_forwards`."""

    def __init__(self, eager: Callable[..., Any], **options: Any) -> None:
        self.eager = eager
        self.compiled = torch.compile(eager, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.eager if _EAGER.get() else self.compiled)(*args, **kwargs)


def compile_blocks(backbone: Backbone, **options: Any) -> None:
    """Compile the forward of each block; `options` are those of `torch.compile`. Keys of the state dict stay."""
    for block in backbone.blocks:
        if not is_compiled(block):
            block.__dict__["forward"] = CompiledForward(block.forward, **options)


def is_compiled(block: nn.Module) -> bool:
    """Whether `compile_blocks` has been here."""
    return isinstance(block.__dict__.get("forward"), CompiledForward)


@contextmanager
def eager_forwards() -> Iterator[None]:
    """Inside, compiled blocks run eagerly."""
    token = _EAGER.set(True)
    try:
        yield
    finally:
        _EAGER.reset(token)
