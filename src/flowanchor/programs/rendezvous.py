"""Where the processes of a run meet (MASTER_ADDR, MASTER_PORT), and what may go wrong there, in one sentence each."""

from __future__ import annotations

import os
import re
import socket

from flowanchor.errors import ConfigError


def check_meeting_point() -> None:
    """Raise `ConfigError` for a port that is none, or a host without address, which PyTorch tries for half an hour."""
    port, host = os.environ.get("MASTER_PORT"), os.environ.get("MASTER_ADDR")
    if port is not None and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"MASTER_PORT={port} is no port: set it to a number from 1024 to 65535, or leave it unset.")
    if host is not None:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"MASTER_ADDR={host} has no address ({reason.lower()}): set it to the machine of the first process."
            ) from error


def trouble(error: BaseException) -> str | None:
    """The sentence for an error of torch.distributed of processes that did not find each other; None for any other."""
    if type(error).__name__ not in ("DistNetworkError", "DistStoreError"):
        return None
    text = " ".join(str(error).split())
    taken = re.search(r"server socket has failed.*?port: (\d+).*?(?:message: ([^.,\[]+)|$)", text)
    if taken is not None:
        return (
            f"Port {taken[1]}, at which the processes of this run are to meet, cannot be opened "
            f"({(taken[2] or 'refused').strip()}): set the environment variable MASTER_PORT to a free one."
        )
    silent = re.search(r"client socket has .*?(?:connect to|address of) [\[(]*([^\s,\])]+?)\]?(?:, |:)(\d+)", text)
    if silent is not None:
        return (
            f"Nothing answers at {silent[1]}:{silent[2]}, where the first process of this run should be: check "
            "MASTER_ADDR and MASTER_PORT, and whether that process has started."
        )
    absent = re.search(r"[Tt]imed out after (\d+) seconds waiting for clients\. (\d+)/(\d+)", text)
    if absent is not None:
        return (
            f"Only {absent[2]} of {absent[3]} processes came together within {absent[1]} seconds: look for the errors "
            "of the others, and start as many as trainer.devices x trainer.num_nodes says."
        )
    return None
