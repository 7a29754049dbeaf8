"""Work that several programs want done, and that one of them does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flowanchor.base.rank_zero import rank_zero_info


@contextmanager
def only_one(target: Path, doing: str) -> Iterator[None]:
    """Within it no other program is within it for the same target; who has to wait is told what for.

    A dead process holds nothing. Where the folder takes no lock (it cannot be written to), nobody waits.
    """
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        rank_zero_info(f"Waiting for another program that is {doing}.")
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()
