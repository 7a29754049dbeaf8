"""What a program does when it is told to stop: by SIGTERM, Ctrl-C (SIGINT), a closed terminal (SIGHUP) or SLURM.

    with listening() as listener:
        work()

The first signal raises `Interrupted` in the main thread, at once; or, while `listener.deferred`, it is only noted for
work that ends at a moment of its own choice (a training: at the end of a step). A second signal ends the process,
whatever its main thread does. Signals that were ignored already (`nohup`) stay ignored.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from flowanchor.base.processes import is_first

STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

# A terminal's Ctrl-C reaches every process, and torchrun then passes it on once more: what comes within so many seconds
# of the first signal is taken for the same one. After as many seconds a user is told what a second one would do.
SAME = 2.0


class Interrupted(SystemExit):
    """The program was told to stop. Uncaught, it ends the process with code 128 + the signal's number.

    Args:
        signum: the signal.
        sentence: what to tell the user; by default that of the listener at this moment.
        together: all processes of the run are at this point, and leave their process group in good order.
    """

    def __init__(self, signum: int, sentence: str | None = None, together: bool = False) -> None:
        super().__init__(128 + signum)
        self.signum, self.together, self.done = signum, together, False
        self.sentence = sentence or stopped_by(signum, _current.state if _current is not None else "")


def name_of(signum: int) -> str:
    """A signal as users know it."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def stopped_by(signum: int, state: str = "") -> str:
    """The sentence for a program that was stopped; `state`: at what point."""
    return f"Stopped by {name_of(signum)}{' ' if state else ''}{state}."


def say(sentence: str) -> None:
    """Write a line to stderr, past sys.stderr, whose lock the main thread may hold."""
    os.write(2, f"{sentence}\n".encode())


class Listener:
    """Notes the signals of one program."""

    def __init__(self) -> None:
        self.first: int | None = None  # the signal by which the program was told to stop
        self.deferred = False  # whether whoever works looks at `first` by itself
        self.state = ""  # at what point of its work the program is, for the sentence
        self.end_others: Callable[[int, str], None] | None = None  # ends the other processes of this run at once
        self.children: list[subprocess.Popen[Any]] = []  # to be waited for
        self.previous: dict[int, Any] = {}  # the handlers that were there before
        self._since = 0.0
        self._told = self._reacted = False

    def tell(self, sentence: str) -> None:
        """Tell the user, once, by one process of the run, why the program ends."""
        if not self._told and is_first():
            say(sentence)
        self._told = True

    def obey(self, signum: int, sentence: str | None = None, together: bool = False) -> NoReturn:
        """Raise `Interrupted`."""
        self.no_longer_defer()
        self._reacted = True
        raise Interrupted(signum, sentence, together)

    def no_longer_defer(self) -> None:
        """From here on signals are obeyed at once; one that was noted already has been dealt with."""
        self.deferred, self._reacted = False, self.first is not None

    # Both of these hear every signal: Python runs `handle` in the main thread, but only between two of its own
    # instructions, and a thread cannot raise anything there.

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self._note(signum)
        if not self._reacted and not self.deferred:
            self.obey(signum)

    def watch(self) -> None:
        while True:
            try:
                numbers = self._inbox.recv(64)
            except TimeoutError:
                self._inbox.settimeout(None)
                self._wait()
                continue
            except OSError:
                return
            if not numbers:
                return
            for signum in numbers:
                if signum in self.previous:
                    self._hear(signum)

    def _note(self, signum: int) -> None:
        if self.first is None:
            self.first, self._since = signum, time.monotonic()

    def _hear(self, signum: int) -> None:
        self._note(signum)
        if time.monotonic() - self._since < SAME:
            self._inbox.settimeout(SAME)
        else:
            self._end(signum, f"{name_of(signum)} came again, so the program ends at once, without saving.")

    def _wait(self) -> None:
        """It takes longer: say so, or end a program whose main thread does not come to hear of it."""
        assert self.first is not None
        if self.deferred and is_first():
            say(
                f"{name_of(self.first)}: this step is finished and saved before the program ends; a second one ends it "
                "at once, without saving."
            )
        elif not self.deferred and not self._reacted:
            self._end(self.first, stopped_by(self.first, self.state))

    def _end(self, signum: int, sentence: str) -> NoReturn:
        if self.end_others is not None:
            self.end_others(signum, sentence)
        self.tell(sentence)
        end_now(128 + signum)

    # ------------------------------------------------------------------------------------------------ installation

    def install(self, signals: Iterable[int]) -> None:
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        for signum in signals:
            before = signal.getsignal(signum)
            if before not in (signal.SIG_IGN, None):
                self.previous[signum] = before
                signal.signal(signum, self.handle)
        self._wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, name="signals", daemon=True).start()

    def remove(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for signum, before in self.previous.items():
            signal.signal(signum, before)
        self._outbox.close()

    def leave_to_parent(self) -> None:
        """In a forked child, a data worker: it works on until its parent, which hears the same signals, ends it.

        PyTorch's own handler ends a worker at a SIGTERM that is sent to the whole group, and the parent then raises
        amidst its last step; so SIGTERM is obeyed where the parent sends it.
        """
        signal.set_wakeup_fd(-1)
        for signum in self.previous:
            if signum != signal.SIGTERM or not hasattr(signal, "sigwaitinfo"):
                signal.signal(signum, signal.SIG_IGN if signum != signal.SIGTERM else signal.SIG_DFL)
            else:
                signal.signal(signum, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
                threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def end_now(code: int) -> NoReturn:
    """End the process, whatever its main thread does."""
    for stream in (sys.stdout, sys.stderr):
        briefly(stream.flush)
    os._exit(code)


def briefly(action: Callable[[], Any]) -> None:
    """Do something that may hang (the main thread may hold a stream's lock for ever) for a second at most."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(1.0)


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


_current: Listener | None = None


def current() -> Listener:
    """The listener of the program that runs; one that never hears anything where there is none."""
    return _current if _current is not None else Listener()


@contextmanager
def listening(also: Iterable[int] = ()) -> Iterator[Listener]:
    """Within it, a program is told to stop by the signals of `STOPS` and `also`; the handlers are restored after it.

    May be nested: the outer one counts. Python has signals handled in the main thread only; elsewhere nothing is heard.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield current()
        return
    _current = listener = Listener()
    listener.install([*STOPS, *also])
    try:
        yield listener
    finally:
        listener.remove()
        _current = None


def _after_fork() -> None:
    if _current is not None:
        with suppress(ValueError, OSError):
            _current.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
