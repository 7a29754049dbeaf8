"""AdamW whose moments are kept in bfloat16: 4 bytes per trained value instead of 8."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowanchor.optimizers.low_moments import LowMoments, State
from flowanchor.weights import local

DISCARDED = 1 << 16  # bfloat16 keeps the upper half of a float32
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWBF16(LowMoments):
    """AdamW (arXiv 1711.05101) with both moments in bfloat16; weights, gradients and arithmetic stay as they are.

    The first moment is rounded to the nearest value. The second one moves by `1 - beta2` of itself in a step, which
    with beta2 = 0.999 is less than half of what bfloat16 can tell apart: rounded to the nearest it would never fall
    again. So it is rounded up or down at random, in proportion, and right on average. The random numbers depend on the
    step and the group alone and are drawn from a generator of their own: a resumed run repeats an uninterrupted one,
    bit for bit, on the same number of processes.

    Args:
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
    """

    def begin(self, p: Tensor) -> State:
        return {name: torch.zeros_like(p, dtype=torch.bfloat16) for name in MOMENTS}

    def read(self, states: list[State]) -> tuple[list[Tensor], list[Tensor]]:
        first, second = ([local(state[name]).float() for state in states] for name in MOMENTS)
        return first, second

    def keep(self, states: list[State], first: list[Tensor], second: list[Tensor], place: tuple[int, ...]) -> None:
        kept = [[local(state[name]) for state in states] for name in MOMENTS]
        torch._foreach_copy_(kept[0], first)
        generator = torch.Generator(first[0].device).manual_seed(_seed(*place))
        for stored, exact in zip(kept[1], second, strict=True):
            stored.copy_(rounded_at_random(exact, generator))


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
