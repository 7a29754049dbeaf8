"""One process trains in a run folder at a time: `run.lock` there says which.

A process that was killed leaves its lock behind. On its own machine that is seen at once; from another machine by the
lock's age, since the holder touches it every few seconds; and a SLURM job that was requeued knows its own.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path

from flowanchor.base.alive import is_alive
from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.errors import ConfigError
from flowanchor.provenance import unwritable

LOCK = "run.lock"
BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a process of another machine counts as dead


@dataclass(frozen=True)
class Holder:
    """A process that trains."""

    token: str  # of this lock alone
    host: str
    pid: int
    since: str
    machine: str | None = None  # the kernel that runs it, and its space of process numbers
    started: str | None = None  # in ticks of that kernel: numbers of processes are used again
    job: str | None = None  # of SLURM
    restarts: int = 0  # how often that job was requeued

    def __post_init__(self) -> None:
        """Raise `TypeError` for what no process of ours writes: a run folder may come from anybody."""
        words = (self.token, self.host, self.since)
        others = (self.machine, self.started, self.job)
        if not all(isinstance(word, str) for word in (*words, *(other or "" for other in others))):
            raise TypeError("not the words of a lock")
        if not all(type(number) is int and 0 <= number < 2**31 for number in (self.pid, self.restarts)):
            raise TypeError("not the numbers of a lock")

    @classmethod
    def this_process(cls) -> Holder:
        job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(
            uuid.uuid4().hex, socket.gethostname(), os.getpid(), now, _machine(), _started(os.getpid()), job,
            int(restarts) if restarts.isdigit() else 0,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """The right to train in a folder: `take()` it, and `release()` it at the end."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOCK
        self.me = Holder.this_process()
        self.lost = False  # another process has taken it, believing this one dead
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Raise `ConfigError` where another process has it; may wait for `SILENCE` to see whether that one lives."""
        try:
            while not self._create():
                holder = _read(self.path, patient=True)
                self._check_dead(holder)
                if self._take_over(holder):
                    break
        except OSError as error:
            raise unwritable(self.path.parent, error) from error
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock if it is this process' own."""
        self._done.set()
        if self._thread is not None and os.getpid() == self.me.pid:  # not in a child that inherited it
            self._thread.join()
            self._thread = None
            with suppress(OSError), self._alone_with(self.me) as mine:
                if mine:
                    self.path.unlink()

    def check(self) -> None:
        """Raise `ConfigError` where another process trains in the folder by now."""
        if self.lost:
            raise ConfigError(
                f"{_read(self.path) or 'Another process'} trains in {self.path.parent} as well, because this one was "
                "silent for long: this one stops here, the other one goes on."
            )

    def _create(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(self.me), file)
        return True

    def _check_dead(self, holder: Holder | None) -> None:
        """Raise `ConfigError` for a process that lives."""
        alive = self._lives(holder) if holder is not None else self._beats()
        if alive:
            raise ConfigError(
                f"Another process trains in {self.path.parent} ({holder or 'unknown'}): wait for it, end it, or pick "
                f"another name=NAME for this run; if there is no such process any more, remove {self.path}."
            )

    def _lives(self, holder: Holder) -> bool:
        if holder.job is not None and holder.job == self.me.job and holder.restarts < self.me.restarts:
            return False  # SLURM ends a job before it starts it again
        if (holder.machine or holder.host) == (self.me.machine or self.me.host):
            return _is_running(holder)
        return self._beats()

    def _beats(self) -> bool:
        """Whether the holder gives a sign of life within `SILENCE` after its last one."""
        last = _touched(self.path)
        if last is None:
            return False
        waited, told = self._now() - last, False
        while waited < SILENCE:
            if not told:
                rank_zero_info(f"Looking for at most {SILENCE - waited:.0f} s whether {self.path} is still in use.")
                told = True
            time.sleep(min(1.0, SILENCE / 10))
            waited += min(1.0, SILENCE / 10)
            if _touched(self.path) != last:
                return True
        return False

    def _now(self) -> float:
        """The time by the clock that stamps the files here, which may be that of a server."""
        probe = self.path.with_name(f"{LOCK}.{self.me.token}")
        probe.touch()
        now = _touched(probe)
        probe.unlink()
        return time.time() if now is None else now

    def _take_over(self, holder: Holder | None) -> bool:
        """Put this process in the place of a dead one: of several that try, one does, and a lock is always there."""
        with self._alone_with(holder) as still:
            if still:
                own = self.path.with_name(f"{LOCK}.{self.me.token}")
                own.write_text(json.dumps(asdict(self.me)), encoding="utf-8")
                own.replace(self.path)
        if still:
            rank_zero_info(f"Taking over {self.path.parent} from a process that is no more ({holder or 'unknown'}).")
        return still

    @contextmanager
    def _alone_with(self, holder: Holder | None) -> Iterator[bool]:
        """Whether the lock is still that holder's; if so, no other process replaces or removes it meanwhile."""
        claim = self._claim_of(holder)
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            touched = _touched(claim)
            if touched is not None and self._now() - touched > SILENCE:  # whose process was killed just then
                claim.unlink(missing_ok=True)
            time.sleep(0.01)
            yield False
            return
        try:
            yield self.path.exists() and _read(self.path) == holder
        finally:
            claim.unlink(missing_ok=True)

    def _claim_of(self, holder: Holder | None) -> Path:
        told = "" if holder is None else holder.token  # by whoever wrote the lock: no part of a path
        return self.path.with_name(f"{LOCK}.of.{sha256(told.encode(errors='backslashreplace')).hexdigest()[:16]}")

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            holder = _read(self.path)
            if holder is not None and holder != self.me:
                self.lost = True
                return
            with suppress(OSError):
                if holder is not None or not self._create():  # somebody has tidied up
                    os.utime(self.path)


def _read(path: Path, patient: bool = False) -> Holder | None:
    """Who holds a lock; None where there is none, or one that is no record of ours. `patient`: it may be in writing."""
    for wait in (0.5, 0.0) if patient else (0.0,):
        with suppress(OSError, ValueError, TypeError):
            return Holder(**json.loads(path.read_text(encoding="utf-8")))
        time.sleep(wait)
    return None


def _touched(path: Path) -> float | None:
    with suppress(OSError), path.open("rb") as file:  # opening it asks a network's server anew
        return os.fstat(file.fileno()).st_mtime
    return None


def _machine() -> str | None:
    """What tells apart machines, and containers that cannot see each other's processes; None where nothing does."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _started(pid: int) -> str | None:
    """When a process of this machine began; None where that is unknown, or it has ended and is only not yet reaped."""
    with suppress(OSError, IndexError):
        state, *rest = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return None if state in "ZX" else rest[18]
    return None


def _is_running(holder: Holder) -> bool:
    """Whether a process of this machine is still the one that took the lock."""
    return is_alive(holder.pid) and (holder.started is None or _started(holder.pid) == holder.started)
