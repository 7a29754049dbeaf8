"""All ranks of a run stop at the same moment, though the signal reaches one of them, or each at another moment.

The moments at which a run could stop (the ends of its steps) are numbered, rising, and alike on all ranks. Who is told
to stop asks the others, through the watchdog's judge, how far they are. A rank that was asked goes on to its next
moment and waits there for the answer, the furthest moment that any rank had passed: all stop at the next one after it.
A thread of each rank tells how far it is, so nobody waits for a rank that waits for it in a collective; and as long as
nobody was told to stop, a step costs no message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flowanchor.errors import FlowAnchorError


class Undecided(FlowAnchorError):
    """The ranks did not agree in time on where to stop."""


class Moments:
    """A rank's side: what its main thread and its watchdog thread share."""

    def __init__(self, ask: Callable[[int], None], patience: float) -> None:
        self._ask, self._patience = ask, patience
        self._lock = threading.Lock()
        self._asked, self._decided = threading.Event(), threading.Event()
        self._passed = self._last = self._signum = 0

    def passing(self, moment: int, signum: int | None) -> int | None:
        """The main thread is at a moment; the signal by which all ranks stop here, or None where they go on.

        Args:
            moment: its number, more than 0.
            signum: the signal that this rank has received, if any.

        Raises `Undecided` where no answer comes.
        """
        if signum is not None and not self._asked.is_set():
            self._ask(signum)
            self._await(self._asked)
        with self._lock:
            self._passed = moment
            asked = self._asked.is_set()
        if not asked:
            return None
        self._await(self._decided)
        return self._signum if moment > self._last else None

    def count(self) -> int:
        """The moment that was passed last; the next one waits for `decide`."""
        with self._lock:
            self._asked.set()
            return self._passed

    def decide(self, last: int, signum: int) -> None:
        """The moment after which all stop."""
        self._last, self._signum = last, signum
        self._decided.set()

    def _await(self, event: threading.Event) -> None:
        if not event.wait(self._patience):
            raise Undecided(
                f"The processes did not agree within {self._patience:g} seconds on the step at which they stop, so "
                "nothing is saved: the same command goes on from the last checkpoint."
            )


class Count:
    """The judge's side: how far the ranks are, once one was told to stop."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._passed: dict[int, int] = {}
        self.signum: int | None = None

    def add(self, rank: int, passed: int) -> int | None:
        """The moment after which all stop, once the last rank has answered."""
        self._passed[rank] = passed
        return max(self._passed.values()) if len(self._passed) == self._ranks else None
