"""Steps that are skipped because they are not finite: counted where the gradients are, and read when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.errors import NonFiniteLossError

ADVICE = "lower optimizer.lr, use trainer.precision=32-true, or check the data."


class SkippedSteps:
    """Decides after each backward pass whether the step is made, and stops the run after `limit` skipped in a row.

    A fused optimizer is told by a tensor (`found_inf`) and leaves weights, moments and its step number alone, so the
    host does not wait for the verdict. It is counted on the device, and known to the host after `read`. Any other
    optimizer finds no gradients, and for that the host reads the norm of every step.

    Attributes:
        total: skipped steps of the whole run.
        in_a_row: those up to the present step.
        last_good_step: the number of steps after the last one that was not skipped.
        verdict: 1. where the latest step is made and 0. where it is skipped: a tensor [] that the host has not read,
            or a bool.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.in_a_row = 0
        self.last_good_step: int | None = None
        self.verdict: Tensor | bool = True
        self._counts: Tensor | None = None  # [3] int64 on the device: total, in a row, last good step (-1: none)
        self._on_device: bool | None = None
        self._step = 0
        self._broken: dict[str, Tensor] = {}  # term -> whether it was not finite since that was last told

    def note(self, terms: Mapping[str, Tensor]) -> None:
        """The terms of a micro-batch, so that a warning can name those that are not finite."""
        for name, value in terms.items():
            broken = ~torch.isfinite(value.detach())
            self._broken[name] = self._broken[name] | broken if name in self._broken else broken

    def judge(self, norm: Tensor, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The gradient's norm [] before step number `step`: have the optimizer make it, or skip it."""
        self._step = step
        if self._on_device is None:
            self._on_device = is_told_on_device(optimizer, norm)
        if self._on_device:
            self._judge_on_device(norm, optimizer)
            return
        self.verdict = bool(torch.isfinite(norm))
        if self.verdict:
            self.in_a_row, self.last_good_step = 0, step + 1
            self._broken.clear()
        else:
            optimizer.zero_grad(set_to_none=True)
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            self._tell(1)
            self.stop_if_it_lasts()

    def _judge_on_device(self, norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        good = torch.isfinite(norm)
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        self.verdict = good.float()
        if self._counts is None:
            last = -1 if self.last_good_step is None else self.last_good_step
            self._counts = torch.tensor([self.total, self.in_a_row, last], device=norm.device)
        total, in_a_row, last_good = self._counts.unbind()
        bad = (~good).long()
        total.add_(bad)
        in_a_row.add_(1).mul_(bad)
        last_good.copy_(torch.where(good, self._step + 1, last_good))

    def logged(self) -> Tensor | float:
        """The total, as it is logged after each step."""
        return float(self.total) if self._counts is None else self._counts[0].float()

    def read(self) -> SkippedSteps:
        """Bring the counts up to date; the host waits for the device where they are there. Warns of new ones."""
        if self._counts is not None:
            before = self.total
            self.total, self.in_a_row, last = (int(count) for count in self._counts.tolist())
            self.last_good_step = None if last < 0 else last
            if self.total > before:
                self._tell(self.total - before)
            self._broken.clear()
        return self

    def restore(self, total: int) -> None:
        """Go on from a checkpoint."""
        self.total, self.in_a_row, self.last_good_step, self._counts = total, 0, None, None

    def stop_if_it_lasts(self) -> None:
        """Raise `NonFiniteLossError` where too many steps in a row were skipped."""
        if self.in_a_row >= self.limit:
            raise NonFiniteLossError(
                f"Training stopped at step {self._step}: {self._where} was not finite {self.in_a_row} times in a row "
                f"(max_nonfinite_steps), and no checkpoint was written meanwhile: {ADVICE}"
            )

    def check_end(self, step: int) -> None:
        """Raise `NonFiniteLossError` where the last steps of a training did nothing."""
        if self.read().in_a_row:
            raise NonFiniteLossError(
                f"Training ended at step {step}, and its last {self.in_a_row} steps were skipped because the loss or "
                f"its gradient was not finite: no checkpoint was written meanwhile; {ADVICE}"
            )

    _where = "the loss"

    def _tell(self, new: int) -> None:
        broken = sorted(name for name, flag in self._broken.items() if bool(flag))
        self._where = (
            f"the {' and '.join(broken)} loss"
            if broken
            else "the gradient (every loss term was finite on this process)"
        )
        self._broken.clear()
        steps = f"{new} steps up to step {self._step} were" if new > 1 else f"A step before step {self._step} was"
        if new == 1 and self.in_a_row:
            steps = f"Step {self._step} was"
        rank_zero_warn(
            f"{steps} skipped: {self._where} was not finite ({self.in_a_row} in a row, {self.total} in all)."
        )


def is_told_on_device(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """Whether it is fused, and its parameters are whole tensors on the device of the norm."""
    groups = optimizer.param_groups
    fused = getattr(optimizer, "_step_supports_amp_scaling", False) and all(group.get("fused") for group in groups)
    parameters = (p for group in groups for p in group["params"])
    return fused and all(not isinstance(p, DTensor) and p.device == norm.device for p in parameters)
