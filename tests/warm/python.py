"""Stands for the interpreter in tests (tests/warm/start.py): `python [-u] [-W ignore] SCRIPT | -c CODE | -m MODULE`.

It hands its words, environment and streams to a process that has imported the slow libraries, which forks; then it
passes on signals and ends as the fork does. What cannot be had from a fork, the real interpreter does.
"""

import json
import os
import signal
import socket
import struct
import sys
from types import FrameType
from typing import NoReturn

PASSED_ON = [
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT
]  # fmt: skip


def cold() -> NoReturn:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


def options(words: list[str]) -> int | None:
    """How many words come before SCRIPT, -c or -m; None: others than a fork understands."""
    at = 0
    while words[at : at + 1] == ["-u"] or words[at : at + 2] == ["-W", "ignore"]:
        at += 1 if words[at] == "-u" else 2
    rest = words[at:]
    return at if rest and (not rest[0].startswith("-") or rest[0] in ("-c", "-m") and len(rest) > 1) else None


def main() -> None:
    words = sys.argv[1:]
    count = options(words)
    streams = [0, 1, 2]
    with socket.socket(socket.AF_UNIX) as server:
        others = {int(name) for name in os.listdir("/proc/self/fd")} - {*streams, server.fileno()}
        if count is None or any(os.path.lexists(f"/proc/self/fd/{number}") for number in others):
            cold()  # it was given files that a fork does not have
        caught: list[int] = []
        ignored = [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
        for number in set(PASSED_ON) - set(ignored):
            signal.signal(number, lambda number, frame: caught.append(number))
        server.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "socket"))
        job = {
            "options": words[:count], "words": words[count:], "folder": os.getcwd(), "environment": dict(os.environ),
            "process": os.getpid(), "signals": {int(number): number in ignored for number in PASSED_ON},
        }  # fmt: skip
        content = json.dumps(job, ensure_ascii=True).encode()
        socket.send_fds(server, [struct.pack("q", len(content))], streams)
        server.sendall(content)
        (child,) = struct.unpack("q", receive(server))
        if child == 0:
            for number in set(PASSED_ON) - set(ignored):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            cold()

        def pass_on(number: int, frame: FrameType | None = None) -> None:
            try:
                os.kill(child, number)
            except ProcessLookupError:
                pass  # it has ended, which the server is about to tell

        for number in set(PASSED_ON) - set(ignored):
            signal.signal(number, pass_on)
        for number in caught:
            pass_on(number)
        (code,) = struct.unpack("q", receive(server))
    sys.stdout = sys.stderr = None  # type: ignore[assignment]  # nothing of its own to flush
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code)


def receive(server: socket.socket) -> bytes:
    answer = server.recv(8, socket.MSG_WAITALL)
    if len(answer) < 8:
        os.kill(os.getpid(), signal.SIGKILL)  # there is no server any more
    return answer


main()
