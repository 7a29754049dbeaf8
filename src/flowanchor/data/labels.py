"""Class labels as texts say them."""

from __future__ import annotations

import re

from flowanchor.base.reading import shown

CLASSES = 1_000_000  # at most, unless their number is given: a label of 999999999 would make a billion
LONGEST = 64  # bytes of a file that holds a label

_NUMBER = re.compile(rb"\s*([0-9]{1,18})\s*")


def read_label(content: bytes | memoryview) -> int | None:
    """A whole number from 0 on, in ASCII's digits and with blanks around it; None for anything else."""
    found = _NUMBER.fullmatch(bytes(content[: LONGEST + 1])) if len(content) <= LONGEST else None
    return None if found is None else int(found[1])


def shown_label(content: bytes | memoryview) -> str:
    """What stands in place of a label, for a message."""
    text = shown(bytes(content[:LONGEST]).decode(errors="replace").strip())
    return text if len(text) <= 20 else f"{text[:20]}..."
