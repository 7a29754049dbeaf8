"""A rank that dies ends the others: they say why, and do not wait in a collective until it times out.

Usable from any torch.distributed program:

    torch.distributed.init_process_group("nccl")
    with RankWatchdog():
        train()

Every rank keeps one TCP connection to a judge, a thread of rank 0. A connection that closes without a goodbye is a
process that died (killed, out of memory, crashed); one that stays silent is a process, or a machine, that froze; an
exception is reported in words. The judge tells all ranks who is to blame and why; they print it and end, even while
their main thread hangs in a collective. Ranks talk to the judge only, so that 512 ranks cost 512 small messages per
interval. torchrun (its agent ends the other workers) and Lightning's launcher (rank 0 ends its children) see ordinary
processes that exit with code 1. Through the same connections, ranks that are told to stop agree on where
(`flowanchor.strategies.stopping`).
"""

from __future__ import annotations

import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from flowanchor.base.causes import unwrapped
from flowanchor.base.signals import briefly, current, end_now, say
from flowanchor.errors import ConfigError
from flowanchor.strategies.channel import Channel, Message, Silence, listen
from flowanchor.strategies.stopping import Count, Moments

SETTLE = 1.0  # seconds for which an error waits for its cause: where a rank dies, the others' collectives may raise
GRACE = 10.0  # seconds that a rank to blame has for its own traceback, before it and the others are ended
LAST = 0.5  # seconds for which the others outlive it: torchrun blames the worker whose end it sees first
CONNECT = 10.0  # seconds in which the judge must be reachable
LONGEST_CAUSE = 500  # characters

UNEXPLAINED = "its process ended without saying why (killed, out of memory or crashed)"
SILENT = "it gave no sign of life for {:g} seconds"


class RankWatchdog:
    """Ends this process, with the cause on stderr, when another rank of the default process group has died.

    Args:
        timeout: seconds without a sign of life after which a rank counts as dead; None switches the watchdog off.
            A process that ends, or raises, is noticed at once: this is for one that is frozen, or cut off. Signs of
            life come from a thread of their own, so a long step, a compilation or a debugger's prompt is no silence;
            a stopped process (SIGSTOP) is. Time in which a rank was itself stopped does not count against others.
        interval: seconds between two signs of life.

    As a context manager it starts, and at the end says goodbye (`stop`) or reports the exception (`fail`).

    Raises `ConfigError` where `timeout` is not longer than two intervals.
    """

    def __init__(self, timeout: float | None = 30.0, interval: float = 2.0) -> None:
        if interval <= 0 or (timeout is not None and timeout <= 2 * interval):
            raise ConfigError(
                f"The rank watchdog's timeout={timeout} must be more than two times its interval={interval} (seconds): "
                "set callbacks.rank_watchdog.timeout=30, or =null to do without it."
            )
        self.timeout, self.interval = timeout, interval
        self._member: _Member | None = None

    def start(self) -> None:
        """Start watching. Collective: every rank of the default process group calls it."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.timeout is None or not several:
            return
        rank = dist.get_rank()
        invitation: list[tuple[str, int, str] | None] = [self._host() if rank == 0 else None]
        dist.broadcast_object_list(invitation, src=0)
        if invitation[0] is None:
            return
        address, port, token = invitation[0]
        try:
            channel = Channel(socket.create_connection((address, port), timeout=CONNECT))
        except OSError as error:
            warnings.warn(
                f"Rank {rank} cannot reach the rank watchdog of rank 0 at {address}:{port} ({error}), so the death of "
                "a rank may go unnoticed until a collective times out.",
                stacklevel=2,
            )
            return
        self._member = _Member(channel, rank, address, token, self.timeout, self.interval)
        self._member.start()

    def fail(self, error: BaseException) -> None:
        """Report why this rank cannot go on; the others end with it.

        Returns where this rank is to blame: it then has `GRACE` seconds to end by itself, with its own traceback.
        Where the error is only the consequence of another rank's death, the process ends here.
        """
        if self._member is not None:
            self._member.fail(cause_of(error))

    def passing(self, moment: int, signum: int | None) -> int | None:
        """At a moment at which the run could stop: the signal by which all ranks do so here, or None to go on.

        Every rank calls it at the same moments, numbered from 1 on, with the signal that it has received itself (None:
        none so far). Raises `Undecided` where a rank does not answer.
        """
        return signum if self._member is None else self._member.moments.passing(moment, signum)

    def end_all(self, signum: int, sentence: str) -> None:
        """Have every other rank end at once with the code of a signal; rank 0 says the sentence."""
        if self._member is not None:
            self._member.end_all(signum, sentence)

    def stop(self) -> None:
        """Say goodbye, so that the end of this process is not taken for a death."""
        if self._member is not None:
            self._member.leave()
        self._member = None

    def __enter__(self) -> RankWatchdog:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.fail(error)

    def _host(self) -> tuple[str, int, str] | None:
        """Start the judge; where it is reached, and the word by which it knows its ranks."""
        assert self.timeout is not None
        address = os.environ.get("MASTER_ADDR") or socket.gethostname()  # where the ranks found rank 0 already
        try:
            listener = listen(address)
        except OSError as error:
            warnings.warn(f"The rank watchdog cannot open a port ({error}), so it watches nothing.", stacklevel=3)
            return None
        token = secrets.token_hex(16)
        _Judge(listener, token, self.timeout, self.interval, dist.get_world_size()).start()
        return address, listener.getsockname()[1], token


def cause_of(error: BaseException) -> str:
    """An exception in one line: its type and its message."""
    error = unwrapped(error)
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " ..."


# ------------------------------------------------------------------------------------------------------------ judge


@dataclass
class _Witness:
    """A rank as the judge sees it."""

    channel: Channel
    silence: Silence
    rank: int = -1  # until it has introduced itself
    host: str = ""
    left: bool = False  # it has said goodbye
    closed: bool = False  # its connection has ended
    failed: str | None = None  # its own report
    lost: str | None = None  # what the judge found


class _Judge(threading.Thread):
    """The thread of rank 0 that hears all ranks and decides who died first."""

    def __init__(self, listener: socket.socket, token: str, timeout: float, interval: float, ranks: int) -> None:
        super().__init__(name="rank-watchdog-judge", daemon=True)
        self._listener, self._token, self._timeout, self._interval = listener, token, timeout, interval
        self._selector = selectors.DefaultSelector()
        self._witnesses: list[_Witness] = []
        self._culprit: int | None = None
        self._first_report: float | None = None
        self._over = self._ending = False
        self._count = Count(ranks)

    def run(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        next_beat = time.monotonic()
        while not self._over:
            for key, _ in self._selector.select(min(self._interval, SETTLE) / 4):
                key.data()
            if time.monotonic() >= next_beat:
                self._tell("beat")
                next_beat = time.monotonic() + self._interval
            self._look_for_silence()
            self._decide()
        self._listener.close()
        for witness in self._witnesses:
            witness.channel.close()

    def _ranks(self) -> list[_Witness]:
        """The ranks, last first: rank 0 hosts the judge, so it must be told last that it ends."""
        return sorted((w for w in self._witnesses if w.rank >= 0), key=lambda w: -w.rank)

    def _tell(self, kind: str, **values: Any) -> None:
        for witness in self._ranks():
            if not witness.closed:
                witness.channel.send(kind, **values)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the peer has gone already
            return
        connection.setblocking(False)
        witness = _Witness(Channel(connection), Silence(self._interval))
        self._witnesses.append(witness)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(witness))

    def _hear(self, witness: _Witness) -> None:
        messages = witness.channel.receive()
        if messages is None:
            self._close(witness)
            return
        witness.silence.broken()
        for message in messages:
            kind = message["kind"]
            if witness.rank < 0:
                if kind != "hello" or message.get("token") != self._token:
                    self._close(witness)
                    return
                witness.rank, witness.host = message["rank"], message["host"]
                if self._count.signum is not None:
                    witness.channel.send("count")
            elif kind == "failed":
                witness.failed = message["cause"]
            elif kind == "stop" and self._count.signum is None:
                self._count.signum = message["signum"]
                self._tell("count")
            elif kind == "passed":
                last = self._count.add(witness.rank, message["count"])
                if last is not None:
                    self._tell("after", last=last, signum=self._count.signum)
            elif kind == "end":
                self._ending = True
                self._tell("end", signum=message["signum"], sentence=message["sentence"])
            elif kind == "bye":
                witness.left = True

    def _close(self, witness: _Witness) -> None:
        self._selector.unregister(witness.channel.socket)
        witness.channel.close()
        witness.closed = True
        if witness.rank < 0:
            self._witnesses.remove(witness)
        elif witness.rank == self._culprit:
            self._tell("gone")
        elif not witness.left and witness.failed is None:
            witness.lost = UNEXPLAINED

    def _look_for_silence(self) -> None:
        for witness in self._ranks():
            silent = witness.silence.grow()
            if silent > self._timeout and not (witness.left or witness.closed or witness.failed or witness.lost):
                witness.lost = SILENT.format(self._timeout)

    def _decide(self) -> None:
        """Name the rank that died first: one that was lost before those whose error may be its consequence."""
        if self._culprit is not None or self._ending:
            return
        lost = [w for w in self._ranks() if w.lost is not None]
        failed = [w for w in self._ranks() if w.failed is not None]
        if not lost and not failed:
            self._dismiss()
            return
        self._first_report = self._first_report or time.monotonic()
        if not lost and time.monotonic() - self._first_report < SETTLE:
            return
        culprit = (lost or failed)[-1]  # the lowest rank
        cause = culprit.lost or culprit.failed
        self._culprit = culprit.rank
        self._tell("verdict", rank=culprit.rank, host=culprit.host, cause=cause)
        if culprit.lost or culprit.closed:
            self._tell("gone")

    def _dismiss(self) -> None:
        """Let those go who said goodbye; the watch ends with rank 0, in whose process the judge lives."""
        leaving = [w for w in self._ranks() if w.left and not w.closed]
        if any(witness.rank == 0 for witness in leaving):
            self._tell("over")
            self._over = True
            return
        for witness in leaving:
            witness.channel.send("over")
            self._close(witness)


# ------------------------------------------------------------------------------------------------------------- rank


class _Member(threading.Thread):
    """The thread of every rank that gives signs of life, and ends the process when the judge says so."""

    def __init__(
        self, channel: Channel, rank: int, judge_host: str, token: str, timeout: float, interval: float
    ) -> None:
        super().__init__(name="rank-watchdog", daemon=True)
        self._channel, self._rank, self._judge_host = channel, rank, judge_host
        self._timeout, self._interval = timeout, interval
        self._to_blame = threading.Event()
        self._failed = self._over = False
        self._latest_end = math.inf
        self.moments = Moments(lambda signum: channel.send("stop", signum=signum), timeout)
        channel.socket.settimeout(interval)
        channel.send("hello", rank=rank, host=socket.gethostname(), token=token)

    def fail(self, cause: str) -> None:
        """Report a cause and wait for the verdict; a process whose verdict names another rank ends meanwhile."""
        if not self.is_alive():
            return
        self._failed = True
        self._channel.send("failed", cause=cause)
        self._to_blame.wait(SETTLE + GRACE + self._timeout)

    def end_all(self, signum: int, sentence: str) -> None:
        self._channel.send("end", signum=signum, sentence=sentence)
        if self._rank == 0:
            time.sleep(LAST)  # the judge, in this process, has others to tell

    def leave(self) -> None:
        self._channel.send("bye")
        self.join(SETTLE + GRACE)  # "over" comes at once, unless a rank has just died

    def run(self) -> None:
        silence = Silence(self._interval)
        last_beat = time.monotonic()
        while not self._over:
            messages = self._channel.receive()
            if messages is None:
                self._lose_judge(UNEXPLAINED)
            elif messages:
                silence.broken()
            for message in messages or []:
                self._obey(message)
            if silence.grow() > self._timeout:
                self._lose_judge(SILENT.format(self._timeout))
            if time.monotonic() > self._latest_end:
                _end()
            if time.monotonic() - last_beat >= self._interval:
                self._channel.send("beat")
                last_beat = time.monotonic()
        self._channel.close()

    def _obey(self, message: Message) -> None:
        if message["kind"] == "over":
            self._over = True
        elif message["kind"] == "gone":
            self._follow()
        elif message["kind"] == "count":
            self._channel.send("passed", count=self.moments.count())
        elif message["kind"] == "after":
            self.moments.decide(message["last"], message["signum"])
        elif message["kind"] == "end":
            current().tell(message["sentence"])
            time.sleep(LAST if self._rank == 0 else 0.0)
            end_now(128 + message["signum"])
        elif message["kind"] == "verdict":
            rank, host, cause = message["rank"], message["host"], message["cause"]
            if rank == self._rank:
                self._take_blame(host, cause)
            self._announce(rank, host, cause)

    def _announce(self, rank: int, host: str, cause: str) -> None:
        """Say who died; this rank ends after it, so that a shell's prompt comes after the culprit's own traceback."""
        _say(f"Rank {rank} ({host}) died: {cause.rstrip('.')}; this rank ends with it.")
        self._latest_end = time.monotonic() + GRACE

    def _take_blame(self, host: str, cause: str) -> NoReturn:
        """Let the main thread go on with its error; where it does not come to its end, end it."""
        if not self._failed:
            _end(f"Rank {self._rank} ({host}) was given up by the others ({cause}), so it ends.")
        self._to_blame.set()
        time.sleep(GRACE)
        _end(f"Rank {self._rank} ({host}) did not end within {GRACE:g} seconds of its error, so it is ended.")

    def _lose_judge(self, cause: str) -> NoReturn:
        if self._latest_end == math.inf:
            self._announce(0, self._judge_host, cause)
        self._follow()

    def _follow(self) -> NoReturn:
        time.sleep(LAST)
        _end()


def _say(sentence: str) -> None:
    say(sentence)
    for stream in (sys.stdout, sys.stderr):
        briefly(stream.flush)  # what was printed before is not lost


def _end(sentence: str | None = None) -> NoReturn:
    """End the process, whatever its main thread does."""
    if sentence is not None:
        _say(sentence)
    os._exit(1)
