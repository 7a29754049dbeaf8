"""AdamW over moments that are kept in few bits: the step, and what a state is when it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.weights import local

State = dict[str, Any]  # of one parameter


class LowMoments(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) in float32; a subclass says how the moments are kept between steps.

    Args:
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
    """

    together = 1 << 26  # values that are updated at once: the update needs 16 bytes for each, or more

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        wrong = [name for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)) if value < 0]
        if wrong or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"optimizer.{(wrong or ['betas'])[0]} is out of range: rates, eps and weight_decay are at least 0, "
                "and betas lie between 0 and 1."
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._kept: list[State] = []
        self.register_load_state_dict_pre_hook(_set_aside)
        self.register_load_state_dict_post_hook(_as_stored)

    def begin(self, p: Tensor) -> State:
        """Both moments of a parameter as zeros, in plain tensors; sharded as it is."""
        raise NotImplementedError

    def read(self, states: list[State]) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moments of some parameters, float32: this process' part, in memory of their own."""
        raise NotImplementedError

    def keep(self, states: list[State], first: list[Tensor], second: list[Tensor], place: tuple[int, ...]) -> None:
        """Put moments (float32) back. `place`: numbers that no other update of the run has."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if not self.state[p]:
                    self.state[p].update(step=torch.zeros(()), **self.begin(p))
                self.state[p]["step"] += 1
            for chunk, parameters in enumerate(self._chunks(trained)):
                self._update(group, parameters, (number, chunk))
        return loss

    def _update(self, group: dict[str, Any], trained: list[Any], place: tuple[int, int]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        states = [self.state[p] for p in trained]
        steps = [float(state["step"]) for state in states]  # counters of the host
        values = [local(p) for p in trained]
        gradients = [local(p.grad).float() for p in trained]
        first, second = self.read(states)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        self.keep(states, first, second, (int(steps[0]), *place))

        sizes = [lr / (1 - beta1**step) for step in steps]
        torch._foreach_sqrt_(second)
        torch._foreach_div_(second, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(second, group["eps"])
        torch._foreach_div_(first, second)
        torch._foreach_mul_(first, sizes)
        torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(values, first)

    def _chunks(self, parameters: list[Any]) -> Iterator[list[Any]]:
        """Parameters in their order, so many together that their values are few."""
        chunk: list[Any] = []
        held = 0
        for p in parameters:
            size = local(p).numel()
            if chunk and held + size > self.together:
                yield chunk
                chunk, held = [], 0
            chunk.append(p)
            held += size
        if chunk:
            yield chunk


def _set_aside(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """PyTorch gives a loaded state the type of its parameter, which would round scales and widen what has few bits."""
    assert isinstance(optimizer, LowMoments)
    order = [index for group in state["param_groups"] for index in group["params"]]
    optimizer._kept = [{k: v for k, v in state["state"].get(i, {}).items() if k != "step"} for i in order]
    counters = {i: {k: v for k, v in entries.items() if k == "step"} for i, entries in state["state"].items()}
    return {**state, "state": counters}


def _as_stored(optimizer: torch.optim.Optimizer) -> None:
    assert isinstance(optimizer, LowMoments)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, entries in zip(parameters, optimizer._kept, strict=True):
        if entries:
            optimizer.state[p].update({name: value.to(p.device) for name, value in entries.items()})
    optimizer._kept = []
