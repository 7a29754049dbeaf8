"""What is finished of an evaluation: lets a run that was killed go on, with any number of processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowanchor.base.files import read_note
from flowanchor.metrics.collected import Collected, Wanted
from flowanchor.metrics.storage import read_arrays, write_whole

FOLDER = ".evaluation"  # in the run folder
VERSION = 1  # of what is stored


class PartialResults:
    """Below `<folder>/.evaluation/<key>`: `NAME.json`, the finished lines of a report, and `NAME/PROCESS.npz`, what
    each process has collected for a line so far.

    Args:
        folder: the run folder, shared by all processes.
        settings: everything that the numbers depend on; others have another key.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        key = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = folder / FOLDER / key

    def begin(self, restart: bool) -> None:
        """Remove what belongs to other settings, and with `restart` what belongs to these; by the first process."""
        for found in self.folder.parent.glob("*"):
            if restart or found != self.folder:
                shutil.rmtree(found, ignore_errors=True)

    def line(self, name: str) -> dict[str, Any] | None:
        """A finished line, None where there is none."""
        return read_note(self.folder / f"{name}.json")

    def finish(self, name: str, line: dict[str, Any]) -> None:
        """Store a line; its parts are no longer needed."""
        write_whole(self.folder / f"{name}.json", json.dumps(line).encode())
        self.forget(name)

    def forget(self, name: str) -> None:
        """Remove the parts of a line."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def save(self, name: str, process: int, collected: Collected) -> None:
        """Replace a process' part."""
        write_whole(self.folder / name / f"{process}.npz", collected.state())

    def parts(self, name: str, wanted: Wanted) -> list[Collected]:
        """What was saved, no image in two of them.

        Where processes have become fewer, the part that was taken over lies beside the one that took it over until it
        is replaced: the one with fewer images is left out.
        """
        stored = (read_arrays(path) for path in sorted((self.folder / name).glob("*.npz")))
        found = [Collected.from_state(wanted, state) for state in stored if state is not None]
        chosen: list[Collected] = []
        for part in sorted(found, key=lambda part: -part.n):
            if not any(_overlap(part, other) for other in chosen):
                chosen.append(part)
        return sorted(chosen, key=lambda part: part.ranges)

    def merged(self, name: str, wanted: Wanted) -> Collected:
        """All parts as one."""
        return merge(self.parts(name, wanted), wanted)


def merge(parts: Sequence[Collected], wanted: Wanted) -> Collected:
    """Parts of different images as one."""
    found = Collected(wanted)
    for part in parts:
        found.merge(part)
    return found


def _overlap(first: Collected, second: Collected) -> bool:
    return any(a < d and c < b for a, b in first.ranges for c, d in second.ranges)
