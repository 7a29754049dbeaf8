"""Whether what runs now is being captured: then nothing may be read from the device, nor a random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flowanchor.errors import FlowAnchorError

# Plain globals: a backward pass runs in threads of its own, where a ContextVar is not seen.
_CAPTURING = [0]
_DRAWS = [0]


class CaptureError(FlowAnchorError):
    """What runs does something that a captured step may not do."""


def capturing() -> bool:
    """Whether what runs now is recorded into a graph."""
    return _CAPTURING[0] > 0


@contextmanager
def being_captured() -> Iterator[None]:
    """A region that is recorded."""
    _CAPTURING[0] += 1
    try:
        yield
    finally:
        _CAPTURING[0] -= 1


def note_draw() -> None:
    """A stage has drawn random numbers that a later pass must draw again: a graph cannot set a random state back."""
    _DRAWS[0] += 1


def draws() -> int:
    """How often that has happened."""
    return _DRAWS[0]
