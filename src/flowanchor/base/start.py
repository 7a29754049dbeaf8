"""The first lines of a program's life, before the seconds in which its libraries are imported.

A process that another one of ours, or torchrun, has started ends with it, from here on: an orphan would wait for the
other ranks until a rendezvous or a collective times out, and keep its GPU. Programs that anything else has started
(a shell that exits, nohup, setsid, srun) are left alone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from flowanchor.base.alive import is_alive
from flowanchor.base.processes import is_first, local_rank
from flowanchor.base.signals import STOPS, say, stopped_by

LAUNCHER = "FLOWANCHOR_LAUNCHER"  # environment: the program of ours that starts others, PROCESS@HOST
PROGRAMS = {"train", "sample", "eval", "encode", "convert", "report", "demo"}

patience = 0.0  # seconds for which an orphan may go on: something else may end it, with words


def launcher() -> str:
    """What a program that starts others writes into their environment, as `LAUNCHER`."""
    return f"{os.getpid()}@{socket.gethostname()}"


def begin() -> None:
    """Called once, when the first module of a program is imported."""
    parent = _parent()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    if _is_ours() and threading.current_thread() is threading.main_thread():
        for signum in STOPS:
            if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(signum, _stop)


def _is_ours() -> bool:
    """Whether this process is a program of ours: by its script, or by the module that it was started with."""
    main = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []  # whose file is not known at its beginning
    return (
        main.parts[-2:] in (("flowanchor", "__main__.py"), ("programs", "__main__.py"))
        or main.stem in PROGRAMS
        or main.name.startswith("flowanchor-")
        or bool(module)
        and (module[0] == "flowanchor" or module[0].startswith("flowanchor.programs"))
    )


def _stop(signum: int, frame: object) -> None:
    """Nothing has been done yet, or everything: `flowanchor.base.signals` listens in between."""
    if is_first():
        say(stopped_by(signum))
    os._exit(128 + signum)


def _parent() -> int | None:
    """The process to end with, if this one was started by it; exits where it has died already."""
    process, _, host = os.environ.get(LAUNCHER, "").partition("@")
    if process.isdigit() and host == socket.gethostname():
        if int(process) == os.getppid():
            return int(process)
        if local_rank() is not None and not is_alive(int(process)):
            os._exit(1)
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ and local_rank() is not None else None


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(patience)
    if is_first():
        say("The process that started this one has ended, so it ends as well.")
    os._exit(1)
