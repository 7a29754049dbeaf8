"""What is finished of an encoding: lets a run that was killed go on, and several processes work on one folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowanchor.base.files import read_note, write_whole
from flowanchor.encoded.manifest import Shard
from flowanchor.errors import ConfigError, DataError

FOLDER = ".encoding"  # beside the files
STAMP = "files"  # among a set's settings: what the images were like (`Source.stamp`)
EARLIER = {"upright": False}  # of sets that do not say
PATIENCE = 5.0  # seconds to wait for another process that is writing what this one reads


@dataclass(frozen=True)
class FinishedShard:
    """A file that is in its place, the images that could not be read for it, and the statistics of its latents.

    `stamp` says what the images of the file were like when it was made; empty: not known.
    """

    shard: Shard
    unreadable: tuple[str, ...]
    statistics: dict[str, Any]
    stamp: str = ""


class EncodingRecord:
    """Files below `<out>/.encoding`, each written in one move: `settings.json`, `shard-N.json`, `process-R.json`."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / FOLDER

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder this encoding's; raises `ConfigError` where it belongs to one with other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        try:
            with path.open("x", encoding="utf-8") as file:  # only one process of several is the first
                file.write(json.dumps(settings))
        except FileExistsError:
            compare(_patiently(path), settings, self.out)

    def finished(self, number: int) -> FinishedShard | None:
        """The record of a shard, None where its file is not there as recorded."""
        content = read_note(self._shard(number))
        if content is None:
            return None
        known = (content["unreadable"], content["statistics"], content.get("stamp", ""))
        found = FinishedShard(Shard(**content["shard"]), tuple(known[0]), *known[1:])
        file = self.out / found.shard.file
        return found if file.is_file() and file.stat().st_size == found.shard.bytes else None

    def forget_changed(self, number: int, stamp: str) -> None:
        """Drop the record of a shard whose images are not what they were when it was made."""
        found = self.finished(number)
        if found is not None and found.stamp not in ("", stamp):
            self._shard(number).unlink(missing_ok=True)

    def finish(self, number: int, shard: FinishedShard) -> None:
        """Record a shard."""
        self._write(self._shard(number), asdict(shard))

    def report(self, process: int, images: int) -> None:
        """How many images a process has encoded; what the progress bar counts."""
        self._write(self.folder / f"process-{process}.json", images)

    def reported(self, process: int) -> int:
        """What another process reported last, 0 before it did."""
        try:
            return int(_read(self.folder / f"process-{process}.json"))
        except (FileNotFoundError, ValueError):
            return 0

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number}.json"

    def _write(self, path: Path, content: Any) -> None:
        write_whole(path, json.dumps(content))


def compare(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raise `ConfigError` that names the settings which are not those of the folder."""
    now = json.loads(json.dumps(now))
    before = {key: value for key, value in EARLIER.items() if key in now} | dict(before)
    changed = [
        f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
        for key in sorted({*before, *now} - {STAMP})
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


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _patiently(path: Path) -> Any:
    """The settings that another process may be about to write."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return _read(path)
        except ValueError as error:
            if time.monotonic() > until:
                raise DataError(f"{path} is damaged: delete it, and run the same command again.") from error
            time.sleep(0.05)
