"""Messages between the processes of a run, beside its collectives: one line of JSON each, over TCP."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import weakref
from typing import Any

LONGEST_LINE = 65536  # bytes; whoever sends more is none of ours

Message = dict[str, Any]


class Channel:
    """Messages over a socket, one line of JSON each."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._rest = b""
        self._sending = threading.Lock()
        _open_sockets.add(connection)

    def send(self, kind: str, **values: Any) -> None:
        """Send a message; to a peer that is gone, nothing: that is noticed by `receive`."""
        try:
            with self._sending:
                self.socket.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> list[Message] | None:
        """What has arrived, after waiting for the socket's timeout at most; None: the peer is gone."""
        try:
            data = self.socket.recv(LONGEST_LINE)
        except (TimeoutError, BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        known = all(isinstance(message, dict) and "kind" in message for message in messages)
        return messages if known and len(self._rest) <= LONGEST_LINE else None

    def close(self) -> None:
        self.socket.close()


def listen(address: str) -> socket.socket:
    """A free port; on this machine only, where the others are told to find it here."""
    if address in ("localhost", "127.0.0.1"):
        listener = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    _open_sockets.add(listener)
    return listener


_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_inherited() -> None:
    for connection in list(_open_sockets):
        connection.close()


# A forked data worker holds copies of the sockets and may outlive its rank: its death must still close the connection.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class Silence:
    """For how long a peer has been silent, counting only time in which this process was awake to listen."""

    def __init__(self, interval: float) -> None:
        self._longest = 2 * interval
        self._last = time.monotonic()
        self.seconds = 0.0

    def broken(self) -> None:
        self.seconds = 0.0

    def grow(self) -> float:
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest)
        self._last = now
        return self.seconds
