"""Under which random state and autocast a pass ran, so that another pass sees the same."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowanchor.graphs.capture import capturing, note_draw
from flowanchor.jvp.compiled import eager_forwards

_DRAWN_BY_OTHERS = [False]  # whether any pass has drawn from Python or numpy, whose states are dear to read


@dataclass
class Surroundings(AbstractContextManager[None]):
    """What a pass found: autocast, and the states of the random numbers of the CPU and its device.

    Those of Python and numpy as well where `others` says so, and everywhere once a pass has drawn from them.

    As a context, which may be entered again and again, it is a region with those random numbers.

    `eager`: whether its compiled blocks ran eagerly, as they do in a tangent pass. Compiled code draws other numbers
    from the same state, so what such a pass drew is drawn again by eager blocks only.
    """

    device: torch.device
    eager: bool
    autocast: tuple[bool, torch.dtype]
    cpu_state: Tensor | None = None
    device_state: Tensor | None = None
    python_state: Any = None
    numpy_state: Any = None
    region: ExitStack = field(default_factory=ExitStack, repr=False)

    @classmethod
    def here(cls, device: torch.device, eager: bool = False, others: bool = False) -> Surroundings:
        """The present states."""
        kind = device.type
        found = cls(device, eager, (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))
        if capturing():  # a graph has no states to read, and none are needed: nothing drew in the eager steps before
            return found
        found.cpu_state = torch.get_rng_state()
        if others or _DRAWN_BY_OTHERS[0]:
            found.python_state, found.numpy_state = random.getstate(), _numpy_state()
        if kind == "cuda":
            found.device_state = torch.cuda.get_rng_state(device)
        return found

    def forget_if_unused(self) -> None:
        """Drop the random states where the pass that followed drew nothing."""
        if self.cpu_state is not None and torch.equal(self.cpu_state, torch.get_rng_state()):
            self.cpu_state = None
        if self.device_state is not None and torch.equal(self.device_state, torch.cuda.get_rng_state(self.device)):
            self.device_state = None
        if self.python_state is not None and self.python_state == random.getstate():
            self.python_state = None
        if self.numpy_state is not None and self.numpy_state == _numpy_state():
            self.numpy_state = None
        _DRAWN_BY_OTHERS[0] |= self.python_state is not None or self.numpy_state is not None
        if any(state is not None for state in self._states()):
            note_draw()

    def _states(self) -> tuple[Any, ...]:
        return self.cpu_state, self.device_state, self.python_state, self.numpy_state

    @property
    def must_run_eagerly(self) -> bool:
        """Whether a pass that is to draw the same numbers has to run its compiled blocks eagerly."""
        return self.eager and any(state is not None for state in self._states())

    def __enter__(self) -> None:
        """Enter a region in which the same numbers are drawn as in that pass; nothing of it leaks out."""
        with ExitStack() as region:
            if self.cpu_state is not None or self.device_state is not None:
                region.enter_context(torch.random.fork_rng([] if self.device_state is None else [self.device]))
            if self.cpu_state is not None:
                torch.set_rng_state(self.cpu_state)
            if self.device_state is not None:
                torch.cuda.set_rng_state(self.device_state, self.device)
            if self.python_state is not None:
                region.callback(random.setstate, random.getstate())
                random.setstate(self.python_state)
            if self.numpy_state is not None:
                region.callback(_set_numpy_state, _numpy_state())
                _set_numpy_state(self.numpy_state)
            if self.must_run_eagerly:
                region.enter_context(eager_forwards())
            self.region = region.pop_all()

    def __exit__(self, *error: Any) -> None:
        self.region.close()

    def autocasting(self) -> AbstractContextManager[None]:
        """A region with the autocast of that pass."""
        enabled, dtype = self.autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)


def _numpy_state() -> tuple[bytes, tuple[Any, ...]]:
    """Of numpy's global generator, in a form that can be compared."""
    _, keys, *rest = np.random.get_state()
    return np.asarray(keys, np.uint32).tobytes(), tuple(rest)


def _set_numpy_state(state: tuple[bytes, tuple[Any, ...]]) -> None:
    np.random.set_state(("MT19937", np.frombuffer(state[0], np.uint32), *state[1]))
