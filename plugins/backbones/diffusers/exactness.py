"""Numbers as fine as they are asked for: float64 that stays, and times that a lower precision does not round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowanchor.jvp.smoothing import smoothed


class _KeepDouble(TorchFunctionMode):
    """What is float64 stays so where the stock forward widens to float32 (`.float()`, `.to(torch.float32)`)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        narrows = func is Tensor.float
        narrows |= func is Tensor.to and (torch.float32 in args[1:] or given.get("dtype") is torch.float32)
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **given)


def exact(tensor: Tensor) -> AbstractContextManager[Any]:
    """A region in which nothing is narrowed, where `tensor` is float64."""
    return _KeepDouble() if tensor.dtype == torch.float64 else nullcontext()


@contextmanager
def exact_times(embedder: nn.Module, level: Tensor, width: float = 0.0) -> Iterator[None]:
    """A region in which the embedder is given the sinusoids of these levels [B] themselves, as they are.

    `width`: in levels, over which their tangents are averaged (`flowanchor.jvp.smoothing`); 0: the exact ones.

    A stock forward in bfloat16 rounds the time first, and then multiplies it by 1,000: the embedding is that of another
    timestep (752 for 750), and its derivative is off by half. An embedder that takes the time itself, and makes its
    sinusoids in float32, is left alone.
    """

    def replace(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if given[0].ndim == 1 else (_told(module, level, given[0], width), *given[1:])

    handle = embedder.register_forward_pre_hook(replace, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def with_end(
    embedder: nn.Module, second: nn.Module, level: Tensor, joined: Callable[[Tensor, Tensor], Tensor], width: float
) -> Iterator[None]:
    """A region in which the embedder's answer is joined with what a second one says of the levels [B] of an end."""

    def join(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Tensor) -> Tensor:
        told = level.to(given[0].dtype) if given[0].ndim == 1 else _told(module, level, given[0], width)
        return joined(out, second(told, *given[1:], **named))

    handle = embedder.register_forward_hook(join, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _told(embedder: nn.Module, level: Tensor, like: Tensor, width: float) -> Tensor:
    """Sinusoids of levels [B] as wide as `like` [B, n], in the type of the embedder's weights."""
    half = like.shape[-1] // 2
    turns = 1000 * 10_000.0 ** -(torch.arange(half, device=level.device) / half)  # radians per unit of level
    found = smoothed(lambda level: sinusoids(level, like.shape[-1]), level, turns.repeat(2), width)
    return found.to(next(embedder.parameters()).dtype)


def sinusoids(level: Tensor, width: int) -> Tensor:
    """Levels [B] -> [B, width], of 1,000 timesteps, cosines first: the table of all these networks."""
    return get_timestep_embedding(1000 * level, width, flip_sin_to_cos=True, downscale_freq_shift=0)
