"""Which process this is stands in the environment, and one file reads it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowanchor.base import processes

SOURCE = Path(processes.__file__).parents[1]


@pytest.mark.parametrize(
    "written, numbers, rank, first",
    [
        ({}, (0, 1), None, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (0, 2), 0, True),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4), 3, False),
        ({"SLURM_PROCID": "2"}, (0, 1), 2, False),
        ({"WORLD_SIZE": ""}, (0, 1), None, True),
    ],
)
def test_as_launchers_write_it(monkeypatch, written, numbers, rank, first):
    for name in {*processes.RANKS, *processes.PLACES, "WORLD_SIZE"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in written.items():
        monkeypatch.setenv(name, value)
    assert processes.this_process() == numbers and processes.rank() == rank and processes.is_first() == first
    assert processes.local_rank() == written.get("LOCAL_RANK")


def test_nobody_else_reads_it():
    read = re.compile(r"environ(\.get\(|\[)\s*\"(RANK|WORLD_SIZE|LOCAL_RANK)\"")
    found = [path.name for path in SOURCE.rglob("*.py") if read.search(path.read_text(encoding="utf-8"))]
    assert found == ["processes.py"]
