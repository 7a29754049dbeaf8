"""What the first process of a run says: Lightning's functions of these names, without the seconds of importing it.

Told lines go to the logger `flowanchor`: in a program, to the screen and to the log file in its folder; where nothing
listens, to stderr.
"""

from __future__ import annotations

import logging
import sys

from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from flowanchor.base.processes import rank

__all__ = ["is_first", "rank_zero_info", "rank_zero_only", "rank_zero_warn"]

_log = logging.getLogger("flowanchor")
_log.setLevel(logging.INFO)

# Lightning keeps what is there, and sets it anew when its strategy knows the rank.
if not hasattr(rank_zero_only, "rank"):
    setattr(rank_zero_only, "rank", rank() or 0)  # noqa: B010 (the function's type has no such attribute)


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


@rank_zero_only
def rank_zero_info(text: str) -> None:
    """Tell the user something that is no warning."""
    if _log.hasHandlers():
        _log.info(text)
    else:  # in a script that has set up no logging
        print(text, file=sys.stderr)
