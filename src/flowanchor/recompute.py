"""`jvp.recompute=auto`: the fastest form of Chain-JVP that fits into memory, decided in a run's first step.

What the forms take is known from a plan (`flowanchor.jvp.memory_plan`). The first one that fits is tried: if the step
runs out of memory, or holds more than there is, the next one is. All processes agree on the form that saves most.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Protocol

import torch
from torch import Tensor

from flowanchor.interfaces import Backbone, Batch, DrawnTimes, Objective, VelocityField
from flowanchor.jvp.attention.operator import Opaque
from flowanchor.jvp.chain import Chain
from flowanchor.jvp.memory_plan import StepOfShapes

FORMS: tuple[bool | str, ...] = (False, "selective", True)  # from the fastest to the one that keeps least
GATHERED = 4  # stages whose weights are whole at once in a sharded network: in use and prefetched, of two networks


class Memory(Protocol):
    """Of a device."""

    def room(self, held: int) -> int:
        """Bytes that this process may still take; `held`: those of its weights."""
        ...

    def start(self) -> None:
        """Measure from here."""
        ...

    def taken(self) -> int | None:
        """Bytes taken at most since `start`, beyond those that were held then; None where nobody counts."""
        ...


class CudaMemory:
    """A card's: what is free and what the allocator keeps for later, but for a tenth of the card."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0

    def room(self, held: int) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + kept - total // 10

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def taken(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class HostMemory:
    """A machine's: half of what it has (or its container may use), shared by the processes on it; never measured."""

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes

    def room(self, held: int) -> int:
        limit = Path("/sys/fs/cgroup/memory.max")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        allowed = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
        return (total if allowed == "max" else min(total, int(allowed))) // 2 // self.processes - held

    def start(self) -> None: ...

    def taken(self) -> int | None:
        return None


@dataclass
class Lasting:
    """Bytes of this process that a step takes and keeps, or that a plan does not count."""

    held: int  # weights
    gradients: int
    moments: int  # of the optimizer, which makes them at its first step
    value: int | None = None  # bytes per gathered value of a sharded network


class RecomputeChoice:
    """One run's choice.

    Made before a strategy shards the networks. `engine.form` is what comes of it.
    """

    def __init__(self, engine: Chain, student: Backbone, objective: Objective, velocity: VelocityField) -> None:
        self.engine, self.index = engine, len(FORMS) - 1
        self.engine.form = FORMS[self.index]
        self.needs: dict[bool | str, int] = {}
        self.measured: dict[bool | str, int | None] = {}
        self.room = 0
        self.why, self.settled, self.others = "", False, False
        self.step: StepOfShapes | None = None
        try:
            self.step = StepOfShapes(student, objective, velocity)
        except Exception as error:  # noqa: BLE001 - a network that cannot be copied
            self._cannot(error)

    def plan(
        self,
        memory: Memory,
        lasting: Lasting,
        batch: Batch,
        noise: Tensor,
        times: DrawnTimes,
        on_host: Tensor,
        step: int,
    ) -> None:
        """Choose by the plan."""
        self.memory, self.lasting, self.room = memory, lasting, memory.room(lasting.held)
        if self.step is None:
            return
        more = lasting.gradients + lasting.moments
        more += 0 if lasting.value is None else GATHERED * lasting.value * self.step.largest_stage()
        try:
            for index, form in enumerate(FORMS[:-1]):
                engine = Chain(form, Opaque(self.engine.attention))
                self.needs[form] = more + self.step.peak(engine, batch, noise, times, on_host, step)
                if self.needs[form] <= self.room:
                    self.index = index
                    break
        except Exception as error:  # noqa: BLE001 - an objective that reads values
            self._cannot(error)
        self.step = None

    def settle(self, agree: Callable[[int], int], attempt: Callable[[], None] | None) -> None:
        """Agree, and try; `attempt` makes the step and leaves nothing of it. None where it cannot be tried."""
        self.settled = True
        mine = self.index
        self._take(agree(mine))
        self.others = self.index != mine
        while attempt is not None and self.engine.form is not True:
            if not self._correct(agree, self._fits(attempt)):
                break
        self.memory.start()

    def correct(self, agree: Callable[[int], int]) -> None:
        """After the first step, which could not be tried: the next form where it took too much."""
        self._correct(agree, self._is_enough(self.memory.taken()))

    def said(self) -> str:
        """In one line: what was chosen, and the numbers."""
        form = self.engine.form
        parts = [self.why] if self.why else []
        if self.others:
            parts.append("what another process has room for")
        if self.needs:
            plans = ", ".join(f"{_word(one)} {_gb(need)}" for one, need in self.needs.items())
            parts.append(f"planned: {plans}; there is room for {_gb(self.room)}")
        for one, taken in self.measured.items():
            took = "ran out of memory" if taken is None else f"took {_gb(taken)}"
            parts.append(f"a step of {_word(one)} {took}")
        return f"jvp.recompute=auto is {_word(form)} in this run ({'; '.join(parts)})."

    def _take(self, index: int) -> None:
        self.index = index
        self.engine.form = FORMS[index]

    def _correct(self, agree: Callable[[int], int], fits: bool) -> bool:
        """Whether another form is to be tried."""
        before = self.index
        self._take(agree(min(before + (not fits), len(FORMS) - 1)))
        return self.index != before

    def _fits(self, attempt: Callable[[], None]) -> bool:
        self.memory.start()
        try:
            attempt()
            return self._is_enough(self.memory.taken())
        except torch.OutOfMemoryError:
            self.measured[self.engine.form] = None
        gc.collect()  # outside of the handler, whose traceback holds the tensors of the step
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return False

    def _is_enough(self, taken: int | None) -> bool:
        if taken is None:
            return True
        self.measured[self.engine.form] = taken + self.lasting.moments
        return taken + self.lasting.moments <= self.room

    def _cannot(self, error: Exception) -> None:
        self.why = f"the step could not be planned: {shorten(f'{type(error).__name__}, {error}', 160)}"
        self.step, self.index = None, len(FORMS) - 1
        self.needs.clear()


def memory_of(device: torch.device, processes: int) -> Memory:
    """What there is for a process, of so many on its machine."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory(processes)


def _word(form: bool | str) -> str:
    return str(form).lower()


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
