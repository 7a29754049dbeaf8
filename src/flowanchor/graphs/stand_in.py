"""A stand-in for CUDA graphs on any device, which shows what a real one would refuse, or get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowanchor.graphs.capture import CaptureError, being_captured
from flowanchor.graphs.cuda import Graph, Outputs


class StandIn:
    """Like `CudaGraphs`, but a replay calls the function again.

    A capture computes nothing: the gradients and random numbers are put back, the outputs are NaN until the first
    replay. A replay writes the same outputs, and must find gradients and autocast where they were.

    Args:
        parameters: whose gradients the function accumulates.
        guarded: raise `CaptureError` at operations that a capture refuses, or whose values would be baked in. It
            watches PyTorch's dispatcher, beside which autograd rounds some operators otherwise: leave it off to
            compare bits.
    """

    def __init__(self, parameters: Sequence[Tensor], guarded: bool = True) -> None:
        self.parameters = list(parameters)
        self.guarded = guarded
        self.captured = self.replayed = 0

    @contextmanager
    def eager(self, rehearsal: bool) -> Iterator[list[str]]:
        yield []

    def capture(self, function: Callable[[], Outputs]) -> Graph:
        self.captured += 1
        return _Again(self, function)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What a captured function runs in."""
        with being_captured(), forbidden() if self.guarded else ExitStack():
            yield

    def addresses(self) -> list[int | None]:
        """Where the gradients lie."""
        return [None if p.grad is None else p.grad.data_ptr() for p in self.parameters]


class _Again:
    def __init__(self, owner: StandIn, function: Callable[[], Outputs]) -> None:
        self.owner, self.function = owner, function
        gradients = [None if p.grad is None else p.grad.clone() for p in owner.parameters]
        random = torch.get_rng_state()
        with owner.recording():
            outputs = function()
        torch.set_rng_state(random)
        for parameter, gradient in zip(owner.parameters, gradients, strict=True):
            if parameter.grad is not None and gradient is not None:
                parameter.grad.copy_(gradient)
        self.outputs = {name: torch.full_like(value, float("nan")) for name, value in outputs.items()}
        self.addresses, self.autocast = owner.addresses(), _autocast()

    def replay(self) -> None:
        self._check("before")
        with self.owner.recording():
            outputs = self.function()
        self._check("after")
        self.owner.replayed += 1
        for name, value in outputs.items():
            self.outputs[name].copy_(value)

    def _check(self, when: str) -> None:
        if self.owner.addresses() != self.addresses:
            raise CaptureError(f"Gradients lie elsewhere {when} a replay than when the step was captured.")
        if _autocast() != self.autocast:
            raise CaptureError("Autocast is another one than when the step was captured.")


def _autocast() -> Any:
    return [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


# --------------------------------------------------------------------------------------------------- what is forbidden

_WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount",
    "unique_consecutive", "item", "allclose", "pin_memory",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Operators(TorchDispatchMode):
    """Raises at operators for which the host waits, or which bring a value of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "lift_fresh":
            raise CaptureError("torch.tensor(...) copies a value of the host, and every replay would use that one.")
        if name in _WAITING:
            raise CaptureError(f"aten.{name}: the host waits for the device.")
        if name in _INDEXING and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise CaptureError(f"aten.{name} by a mask: the host waits for the number of its elements.")
        if name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
            raise CaptureError("aten.repeat_interleave by a tensor: the host waits for its sum.")
        if kwargs.get("generator") is not None:
            raise CaptureError(f"aten.{name} draws from a generator of its own, which the graph does not know.")
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
            if target is not None and isinstance(source, Tensor) and torch.device(target).type != source.device.type:
                raise CaptureError(f"aten.{name} copies between host and device.")
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """The same for what does not reach the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__) or func is torch.from_numpy:
            raise CaptureError(f"{func.__name__}: a value goes between the host and the device.")
        return func(*args, **(kwargs or {}))


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CaptureError(f"torch.{name}: a random state is read or set.")

    return refuse


@contextmanager
def forbidden() -> Iterator[None]:
    """A region in which operations that no captured step may do raise `CaptureError`."""
    with ExitStack() as stack:
        for name in ("get_rng_state", "set_rng_state", "manual_seed", "seed", "initial_seed"):
            stack.enter_context(mock.patch.object(torch, name, _refuse(name)))
        for name in ("get_rng_state", "set_rng_state", "synchronize"):
            stack.enter_context(mock.patch.object(torch.cuda, name, _refuse(f"cuda.{name}")))
        stack.enter_context(_Operators())
        stack.enter_context(_Functions())
        yield
