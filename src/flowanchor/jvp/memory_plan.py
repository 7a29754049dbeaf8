"""What a training step takes, by running it on tensors that have shapes and no values.

The networks are copied without their values, before a strategy shards them. Objective, teacher and engine run as they
are, forward and backward, and every tensor is counted from the operator that makes it to its release. Kernels need more
while they run, compiled code less; attention's tangent counts as its outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from flowanchor.interfaces import Backbone, Batch, DrawnTimes, Objective, TangentEngine, VelocityField
from flowanchor.jvp.compiled_dual import Traceable
from flowanchor.jvp.live_bytes import LiveBytes
from flowanchor.jvp.surroundings import Surroundings
from flowanchor.jvp.watch import take_as_seen


class ShapesOnly(FakeTensorMode):
    """Tensors without values. Real ones may still be compared: the engines look whether random numbers were drawn.

    Truth values of a batch (masks) stay real while they are looked at, put side by side or moved: which tokens are text
    decides the shapes of what follows. What combines them to something larger makes no values any more.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is torch.ops.aten.equal and not any(isinstance(a, FakeTensor) for a in args):
            return func(*args)
        if packet in _LOOKS:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if given and all(one.dtype == torch.bool and not isinstance(one, FakeTensor) for one in given):
                return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _cache(known: dict[Any, Any]) -> Iterator[None]:
    """PyTorch's cache of fake tensors, which a process shares: after another run it may hold views that are dual
    numbers."""
    shared, FakeTensorMode.cache = FakeTensorMode.cache, known
    try:
        yield
    finally:
        FakeTensorMode.cache = shared


_LOOKS = {
    getattr(torch.ops.aten, name)
    for name in (
        "alias", "all", "cat", "clone", "constant_pad_nd", "detach", "expand", "is_nonzero", "nonzero", "select",
        "slice", "stack", "sum", "unbind", "unsqueeze", "view", "where", "_local_scalar_dense", "_to_copy",
    )
}  # fmt: skip


class InTheClear(TorchFunctionMode):
    """Within it, products of some weights take what those of quantised weights take (torchao, weight-only).

    Each product makes plain numbers of the weight, in the type of the other factor, of which autocast makes its own; a
    graph through it keeps these. The scales come after it.
    """

    def __init__(self, quantised: Container[int]) -> None:
        super().__init__()
        self.quantised = quantised  # by id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(id(one) in self.quantised for one in args[:2]):
            return func(*args, **kwargs)
        if func is functional.linear:
            x, weight, bias = (*args, *kwargs.values(), None)[:3]
            out = functional.linear(x, weight.to(x.dtype, copy=True))
            out = out * out.new_empty(out.shape[-1])
            return (out if bias is None else out.add_(bias)).to(x.dtype)
        if func in (torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__):
            args = [one.clone() if id(one) in self.quantised else one for one in args]
        return func(*args, **kwargs)


class StepOfShapes:
    """A training step of copies without values, which can be run again and again."""

    def __init__(self, student: Backbone, objective: Objective, velocity: VelocityField) -> None:
        self.mode = ShapesOnly(allow_non_fake_inputs=True)
        self.known: dict[Any, Any] = {}  # what operators make of which shapes
        self.originals = student, objective, velocity
        plain = self._stand_ins()
        self.quantised = {id(one): one for one in plain.values()}
        buffers = {id(b): b for network in self.originals for b in network.buffers() if b.dtype == torch.bool}
        with FakeCopyMode(self.mode):
            self.student, self.objective, self.velocity = copy.deepcopy(self.originals, plain | buffers)
        self.device: torch.device | None = None  # where they are taken to be
        take_as_seen(self.student)

    def _stand_ins(self) -> dict[int, Any]:
        """Plain weights for quantised ones, by what `deepcopy` asks for; products take them as `InTheClear` says.

        They are not looked at themselves: a module that moves to a device exchanges them, which nobody may refer to.
        """
        parameters = (parameter for network in self.originals for parameter in network.parameters())
        quantised = {id(p): p for p in parameters if is_traceable_wrapper_subclass(p)}
        with torch.device("meta"):
            made = {key: torch.empty(p.shape, dtype=p.dtype) for key, p in quantised.items()}
        return {key: nn.Parameter(self.mode.from_tensor(one), requires_grad=False) for key, one in made.items()}

    def largest_stage(self) -> int:
        """How many values the parameters of the student's largest stage have."""
        return max(
            sum(p.numel() for part in stage for p in part.parameters()) for stage in self.student.stage_modules()
        )

    def peak(
        self, engine: TangentEngine, batch: Batch, noise: Tensor, times: DrawnTimes, on_host: Tensor, step: int
    ) -> int:
        """Bytes that forward and backward hold at most, beside the weights and the gradients of earlier stages.

        Args:
            batch, noise, times: what an objective takes; with values or without.
            on_host: the times `t` [B] on the host.
            step: the number of the step.
        """
        # In a thread of its own, which modes around this step and what forward-mode AD has left do not reach.
        with ThreadPoolExecutor(1) as thread:
            kind = batch.x1.device.type
            autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            run = partial(self._peak, engine, autocast, batch, noise, times, on_host, step)
            return thread.submit(copy_context().run, run).result()

    def _peak(
        self, engine: TangentEngine, autocast: torch.autocast, batch: Batch, noise: Tensor, times: DrawnTimes,
        on_host: Tensor, step: int,
    ) -> int:  # fmt: skip
        device = batch.x1.device
        for ours, theirs in zip(self.copies(), self.originals, strict=True):
            for module, original in zip(ours.modules(), theirs.modules(), strict=True):
                module.training = original.training
        self.objective.at_step(step)
        self.student.at_times(on_host)  # whose values decide, as whether a teacher's guidance reaches any of them
        self.velocity.at_times(on_host)
        with Surroundings.here(device, others=True), _cache(self.known), self.mode:
            self._place(device)
            batch, noise, times = tree_map(self._without_values, (batch, noise, times))
            with Traceable(), LiveBytes() as counter, InTheClear(self.quantised):
                with autocast:
                    loss = self.objective(self.student, batch, self.velocity, engine, noise, *times).loss
                loss.backward()  # outside of autocast, as a step's own
        return counter.peak

    def _place(self, device: torch.device) -> None:
        """The copies on a device; their gradients are dropped as soon as they are made."""
        if self.device == device:
            return
        self.device = device
        made: dict[int, nn.Parameter] = {}  # a tied parameter stays one
        quantised = {}
        for module in {m: None for network in self.copies() for m in network.modules()}:
            for name, old in module._parameters.items():
                if old is not None and id(old) not in made:
                    made[id(old)] = nn.Parameter(torch.empty_like(old, device=device), old.requires_grad)
                    if id(old) in self.quantised:
                        quantised[id(made[id(old)])] = made[id(old)]
                    if old.requires_grad:
                        made[id(old)].register_post_accumulate_grad_hook(_drop)
                module._parameters[name] = None if old is None else made[id(old)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    told = buffer.dtype == torch.bool
                    module._buffers[name] = buffer.to(device) if told else torch.empty_like(buffer, device=device)
        self.quantised = quantised

    def copies(self) -> tuple[Backbone, Objective, VelocityField]:
        return self.student, self.objective, self.velocity

    def _without_values(self, leaf: Any) -> Any:
        """Beside truth values, which are few."""
        without = isinstance(leaf, Tensor) and leaf.dtype != torch.bool
        return self.mode.from_tensor(leaf) if without else leaf


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
