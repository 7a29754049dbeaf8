"""The record of a check: written after every row, so that nothing that was measured is lost."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowanchor.base.files import write_json

UNFINISHED = "its process ended or was ended in it"
LATE = "out of time"


@dataclass(frozen=True)
class Row:
    """One measurement: `measure()` gives its figures; `limit`: seconds after which it is given up."""

    name: str
    measure: Callable[[], dict[str, Any]]
    limit: float = 90.0
    least: float = 8.0  # seconds; with fewer left it is not begun


class Record:
    """`{"machine": ..., "rows": {name: figures or {"missing": why}}}` in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.content["rows"]

    def put(self, name: str, figures: dict[str, Any]) -> None:
        self.rows[name] = figures
        self.write()

    def write(self) -> None:
        write_json(self.path, self.content)

    def run(self, row: Row, ends: float) -> bool:
        """Measure a row that has not been begun; whatever happens is recorded. Returns False where it failed.

        ends: the moment (`time.time()`) after which no row is begun.
        """
        if row.name in self.rows:
            return True
        if time.time() + row.least > ends:
            self.put(row.name, {"missing": LATE})
            return True
        self.put(row.name, {"missing": UNFINISHED})
        began = time.perf_counter()
        try:
            found = row.measure()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one row must not cost the others
            where = traceback.format_exc()[-1500:]
            found = {"missing": f"{type(error).__name__}: {error}"[:400], "where": where}
        self.put(row.name, {**found, "took_s": round(time.perf_counter() - began, 1)})
        print(f"{row.name}: {_short(found)}", flush=True)
        return "where" not in found


def _short(figures: dict[str, Any]) -> str:
    plain = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in figures.items() if not isinstance(v, dict)}
    return ", ".join(f"{key} {value}" for key, value in plain.items() if key != "where")[:300]
