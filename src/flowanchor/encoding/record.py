"""What is finished of an encoding: lets a run that was killed go on, and several processes work on one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowanchor.base.files import write_whole
from flowanchor.errors import ConfigError
from flowanchor.latents.manifest import Shard

FOLDER = ".encoding"  # beside the files


@dataclass(frozen=True)
class FinishedShard:
    """A file that is in its place, the images that could not be read for it, and the statistics of its latents."""

    shard: Shard
    unreadable: tuple[str, ...]
    statistics: dict[str, Any]


class EncodingRecord:
    """Files below `<out>/.encoding`, each written in one move: `settings.json`, `shard-N.json`, `process-R.json`."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / FOLDER

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder this encoding's; raises `ConfigError` where it belongs to one with other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        own = self.folder / f"settings.{os.getpid()}"
        own.write_text(json.dumps(settings))
        try:
            os.link(own, path)  # fails where it exists: only one process of several is the first
        except FileExistsError:
            compare(json.loads(path.read_text()), settings, self.out)
        finally:
            own.unlink()

    def finished(self, number: int) -> FinishedShard | None:
        """The record of a shard, None where its file is not there as recorded."""
        path = self._shard(number)
        try:
            content = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        found = FinishedShard(Shard(**content["shard"]), tuple(content["unreadable"]), content["statistics"])
        file = self.out / found.shard.file
        return found if file.is_file() and file.stat().st_size == found.shard.bytes else None

    def finish(self, number: int, shard: FinishedShard) -> None:
        """Record a shard."""
        self._write(self._shard(number), asdict(shard))

    def report(self, process: int, images: int) -> None:
        """How many images a process has encoded; what the progress bar counts."""
        self._write(self.folder / f"process-{process}.json", images)

    def reported(self, process: int) -> int:
        """What another process reported last, 0 before it did."""
        try:
            return int(json.loads((self.folder / f"process-{process}.json").read_text()))
        except (FileNotFoundError, ValueError):
            return 0

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number}.json"

    def _write(self, path: Path, content: Any) -> None:
        write_whole(path, json.dumps(content))


def compare(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raise `ConfigError` that names the settings which are not those of the folder."""
    now = json.loads(json.dumps(now))
    changed = [
        f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{out} holds an encoding with other settings ({'; '.join(changed)}): use them again, or choose another "
            "out=."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
