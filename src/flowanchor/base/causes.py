"""What went wrong, under what a library has put around it."""

from __future__ import annotations

from collections.abc import Iterator

from flowanchor.base.processes import rank


def unwrapped(error: BaseException) -> BaseException:
    """The error itself, or the one inside what torch.distributed.checkpoint makes of the errors of several ranks.

    Its `CheckpointException`, which is not even an `Exception`, holds each rank's own: here that of this process, or
    of the lowest rank that has one. What it was raised `from` stays reachable.
    """
    failures = getattr(error, "failures", None)
    if not isinstance(failures, dict) or not failures or isinstance(error, Exception):
        return error
    own = rank()
    found = None if own is None else failures.get(own)
    inner = (found or failures[min(failures)])[0]
    return unwrapped(inner) if isinstance(inner, BaseException) else error


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, each once."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__
