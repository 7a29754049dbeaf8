"""Bars, tables and the blocks of a page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import engines
import harness
import ranks
import worker
from claims import growth, sharded
from counting import LiveBytes
from harness import Reading, Row, machine, markdown, peak, refresh, speed
from workloads import Workload

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
def test_the_other_claims_in_this_process(monkeypatch):
    """What the workers do, without starting them; what processes take, and ranks tell each other, is made up."""

    def ask(task: dict[str, Any], environment: Any) -> Any:
        return {"time": worker.time_in_turns, "memory": worker.memory}[task.pop("measure")](**task)

    def peaks(work: Workload) -> dict[str, int]:
        work.forget()
        with LiveBytes() as counter:
            work.step()
        return {"process": counter.peak, "counted": counter.peak}

    def alone(processes: int, task: dict[str, Any]) -> Any:
        assert task.pop("measure") == "compare"
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        try:
            return ranks.compare(**task)
        finally:
            dist.destroy_process_group()

    monkeypatch.setattr(harness, "_ask", ask)
    monkeypatch.setattr(worker, "_peaks", peaks)
    monkeypatch.setattr(worker, "_forked", lambda function: function())
    monkeypatch.setattr(sharded, "together", alone)
    monkeypatch.setattr(growth, "DEPTHS", (1, 2))
    monkeypatch.setattr(engines, "QUICK", {**engines.QUICK, "depth": 1, "input_size": 8})
    claims = engines.run([name for name in engines.CLAIMS if name != "attention"], rounds=1, quick=True)
    rows = [row for claim in claims.values() for row in claim.rows]
    assert all(value > 0 for row in rows for value in row.values)
    assert engines.table(rows, machine()).count("\n| ") == len(rows) + 1
    counted = {name: reading.counted_peak for name, reading in claims["engines"].measured.items()}
    assert counted["Chain(recompute)"] < counted["Chain(recompute=False)"] < counted["Full"]
    gathers = {
        name: counts["all_gather"] for name, counts in claims["sharded"].measured["collectives"].items() if counts
    }
    assert gathers["joint walk"] < gathers["two walks"]


@pytest.mark.slow
def test_what_a_training_step_costs_the_host():
    """It reads no value, and as a graph next to nothing is called."""
    script = str(ROOT / "benchmarks" / "training_step.py")
    done = subprocess.run([sys.executable, script, "--steps", "2"], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    found = {name: [float(figure.replace(",", "")) for figure in figures] for name, *figures in lines}
    assert found.keys() == {"now", "as a graph"}
    assert 0 < found["as a graph"][0] < found["now"][0] / 10
    assert found["now"][1:] == found["as a graph"][1:] == [0, 0]


@pytest.mark.slow
def test_every_claim_from_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "engines.py"), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "engines_cpu.json").read_text())["measured"]
    assert measured.keys() == {"engines", "growth", "facm_step", "attention", "sharded"}
    gathers = {name: counts["all_gather"] for name, counts in measured["sharded"]["collectives"].items() if counts}
    assert gathers["joint walk"] < gathers["two walks"]
