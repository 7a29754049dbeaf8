"""AdamW whose moments are kept in bfloat16: 4 bytes per trained value instead of 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.weights import local

LARGEST = 1 << 26  # values that are updated together: what the update needs for itself is 16 bytes for each
DISCARDED = 1 << 16  # bfloat16 keeps the upper half of a float32
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWBF16(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with both moments in bfloat16; weights, gradients and arithmetic stay as they are.

    The first moment is rounded to the nearest value. The second one moves by `1 - beta2` of itself in a step, which
    with beta2 = 0.999 is less than half of what bfloat16 can tell apart: rounded to the nearest it would never fall
    again. So it is rounded up or down at random, in proportion, and right on average. The random numbers depend on the
    step and the group alone and are drawn from a generator of their own: a resumed run repeats an uninterrupted one,
    bit for bit, on the same number of processes.

    Args:
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
    """

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
        self.register_load_state_dict_post_hook(_as_stored)

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
                    moments = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name in MOMENTS}
                    self.state[p].update(step=torch.zeros(()), **moments)
                self.state[p]["step"] += 1
            for chunk, together in enumerate(_chunks(trained)):
                self._update(group, together, (number, chunk))
        return loss

    def _update(self, group: dict[str, Any], trained: list[Any], place: tuple[int, int]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        steps = [float(self.state[p]["step"]) for p in trained]  # counters of the host
        values = [local(p) for p in trained]
        gradients = [local(p.grad).float() for p in trained]
        kept = [[local(self.state[p][name]) for p in trained] for name in MOMENTS]
        first, second = ([moment.float() for moment in moments] for moments in kept)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        torch._foreach_copy_(kept[0], first)
        generator = torch.Generator(values[0].device).manual_seed(_seed(int(steps[0]), *place))
        for stored, exact in zip(kept[1], second, strict=True):
            stored.copy_(rounded_at_random(exact, generator))

        sizes = [lr / (1 - beta1**step) for step in steps]
        torch._foreach_sqrt_(second)
        torch._foreach_div_(second, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(second, group["eps"])
        torch._foreach_div_(first, second)
        torch._foreach_mul_(first, sizes)
        torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(values, first)


def rounded_at_random(exact: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours, the nearer the likelier: right on average.

    Random bits are added to those that bfloat16 lacks, and these are cut off: the carry rounds up.
    """
    bits = exact.view(torch.int32)
    noise = torch.randint_like(bits, DISCARDED) if generator is None else torch.empty_like(bits).random_(
        0, DISCARDED, generator=generator
    )  # fmt: skip
    cut = (bits + noise).bitwise_and_(-DISCARDED).view(torch.float32)
    return torch.where(exact.isfinite(), cut, exact).to(torch.bfloat16)


def _seed(*numbers: int) -> int:
    """One seed of several numbers, mixed: a CPU's generator looks at 32 bits of it alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _chunks(parameters: list[Any]) -> Iterator[list[Any]]:
    """Parameters in their order, so many together that their values are few."""
    together: list[Any] = []
    held = 0
    for p in parameters:
        size = local(p).numel()
        if together and held + size > LARGEST:
            yield together
            together, held = [], 0
        together.append(p)
        held += size
    if together:
        yield together


def _as_stored(optimizer: torch.optim.Optimizer) -> None:
    """PyTorch gives a loaded state the type of its parameter; moments go back to theirs, which loses nothing."""
    for state in optimizer.state.values():
        for name in MOMENTS:
            state[name] = state[name].to(torch.bfloat16)
