"""Bars, tables and the blocks of a page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import Reading, Row, machine, markdown, peak, refresh, speed

ROOT = Path(__file__).parents[2]


def reading(seconds: float, process: int, counted: int) -> Reading:
    return Reading(seconds, [seconds], process, counted)


def test_a_row_meets_its_bar_only_with_every_figure():
    ours, theirs = reading(1.1, 10, 30), reading(1.0, 100, 100)
    assert speed("a / b", ours, theirs, 1.2).cells() == ["a / b", "CPU time", "1.10", "<= 1.2", "yes"]
    assert speed("a / b", ours, theirs, 1.0).cells()[-1] == "**no**"
    assert peak("a / b", ours, theirs, 1 / 7).cells() == [
        "a / b", "peak: process, counted", "0.10, 0.30", "<= 1/7", "**no**"
    ]  # fmt: skip
    assert Row("a", "b", (2.0,)).cells()[-2:] == ["", ""]


def test_refresh_replaces_one_block_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- some table: make it -->\nold\n<!-- end of some table -->\nafter\n")
    refresh(page, "some table", markdown(["a"], [[1]]))
    assert page.read_text() == (
        "before\n<!-- some table: make it -->\n| a |\n| --- |\n| 1 |\n<!-- end of some table -->\nafter\n"
    )
    with pytest.raises(SystemExit, match="no place for 'another table'"):
        refresh(page, "another table", "")


def test_the_record_names_the_machine_and_nothing_private():
    about = machine()
    assert {"cpu", "cores", "torch", "date", "commit"} <= about.keys()
    assert str(ROOT) not in json.dumps(about)


def test_pages_have_the_places_that_the_commands_refresh():
    places = {
        "README.md": ["demo table", "engines table", "gpu table"],
        "docs/memory.md": ["memory plan", "memory check"],
        "docs/performance.md": ["dual pass table"],
    }
    for page, names in places.items():
        text = (ROOT / page).read_text()
        for name in names:
            assert text.count(f"<!-- {name}: ") == text.count(f"<!-- end of {name} -->") == 1, (page, name)


def test_one_claim_from_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "engines.py"), "--quick", "--only", "attention"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "engines_cpu.json").read_text())
    measured = record["measured"]["attention"]
    assert measured["streaming"]["counted_peak"] < measured["math"]["counted_peak"]
    assert all(seconds > 0 for case in measured.values() for seconds in case["rounds"])
    assert "attention streaming / math" in done.stdout


@pytest.mark.slow
def test_every_claim_from_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "engines.py"), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "engines_cpu.json").read_text())["measured"]
    assert measured.keys() == {"engines", "growth", "facm_step", "attention", "sharded"}
    gathers = {name: counts["all_gather"] for name, counts in measured["sharded"]["collectives"].items() if counts}
    assert gathers["joint walk"] < gathers["two walks"]
