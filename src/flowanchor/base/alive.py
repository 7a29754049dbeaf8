"""Whether a process of this machine is still there."""

from __future__ import annotations

import os


def is_alive(process: int) -> bool:
    """Whether a process with this number runs here, anybody's."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
