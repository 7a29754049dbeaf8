"""Recording the outputs of linear layers in one pass of a stage, and using them again in another.

Linear layers are what is dear in a transformer's forward, and an output is all that is missing to differentiate one:
its gradient needs the input, which the second pass computes anyway, and the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowanchor.errors import ConfigError
from flowanchor.jvp.compiled import eager_forwards


class Recording:
    """Outputs of the linear layers of one pass, in order."""

    def __init__(self, outputs: Iterable[Tensor] = ()) -> None:
        self.outputs = list(outputs)


@contextmanager
def record(recording: Recording | None) -> Iterator[None]:
    """A region whose linear layers are recorded (values, not tangents), and whose compiled blocks run eagerly."""
    if recording is None:
        yield
        return
    with eager_forwards(), _Record(recording):
        yield


@contextmanager
def unrecorded() -> Iterator[None]:
    """A region inside a recorded one that leaves nothing in the recording (products with a tangent)."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


_PAUSED: ContextVar[bool] = ContextVar("recording_paused", default=False)


@contextmanager
def replay(recording: Recording) -> Iterator[None]:
    """A region whose linear layers return what was recorded, with gradient; the recording is used up.

    Compiled blocks run eagerly in it, as they did when they were recorded.
    """
    with eager_forwards(), _Replay(recording):
        yield


class _Record(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.linear and not _PAUSED.get():
            self.recording.outputs.append(out.detach())
        return out


class _Replay(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.rest = iter(recording.outputs)
        recording.outputs = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            output = next(self.rest, None)
            if output is None:
                raise ConfigError(
                    "A stage was differentiated a second time, and what jvp.recompute=selective had recorded of it is "
                    "used up: choose jvp.recompute=true."
                )
            return _KnownLinear.apply(output, *_linear_arguments(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return input, weight, bias


class _KnownLinear(torch.autograd.Function):
    """`input @ weight.T + bias` whose value is known."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input.to(output.dtype), weight)
        ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.dtypes
        rows = gradient.flatten(0, -2)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_input = (rows @ _numbers(weight).to(rows.dtype)).view(input.shape).to(of_input)
        if ctx.needs_input_grad[2]:
            grad_weight = (rows.t() @ input.flatten(0, -2)).to(of_weight)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0).to(of_bias)
        return None, grad_input, grad_weight, grad_bias


def _numbers(weight: Tensor) -> Tensor:
    """A weight whose class stands for quantised numbers, which knows no product but a linear layer, as plain ones."""
    return weight.dequantize() if type(weight).dequantize is not Tensor.dequantize else weight
