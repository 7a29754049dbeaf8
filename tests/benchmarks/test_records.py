"""What a page shows as measured is what the record of its benchmark says, and each says where it comes from."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ablation
import compiled_dual
import data_loading
import described
import emoji_pictures
import engines
import forgetting
import gpu_evidence
import growth
import lora_digits
import memory_plan
import samplers
import second_opinion
import small_cards
import stability
import teacher
import training_step
import wan_digits
import what_it_takes
from gpu import table as gpu_table
from gpu_check import recorded
from harness import Row

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("benchmarks_demo", ROOT / "benchmarks" / "demo.py")  # src has one, too
assert _spec is not None and _spec.loader is not None
demo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(demo)
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(record: dict[str, Any]) -> list[Row]:
    return [Row(row["claim"], row["what"], tuple(row["values"]), row["bar"]) for row in record["rows"]]


def ablated(rows: tuple[ablation.Row, ...]) -> Callable[[dict[str, Any]], str]:
    return lambda record: ablation.page(tuple(r for r in rows if r.name in record["cpu_seconds"]), record, 1800)


def planned(record: dict[str, Any]) -> str:
    plans = {
        name: {
            engine: {int(world): memory_plan.Plan(**one) for world, one in of.items()} for engine, of in found.items()
        }
        for name, found in record["plans"].items()
    }
    return memory_plan.report(plans)


def taken(record: dict[str, Any]) -> str:
    plans = json.loads((RESULTS / "memory_plan.json").read_text())["plans"]
    return what_it_takes.page(record, plans, recorded())


EMOJI = ("face", "animal-face", "heart")  # the classes of the recipes
# page, name of the block, record, how the record becomes the block
BLOCKS: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
    ("docs/results/ablation.md", "ablation table", "ablation_digits", ablated(ablation.ROWS)),
    ("docs/results/ablation.md", "relatives table", "ablation_relatives", ablated(ablation.RELATIVES)),
    ("docs/results/forgetting.md", "forgetting table", "forgetting", forgetting.page),
    *(
        ("docs/results/stability.md", f"stability on {data}", f"stability_{data}",
         lambda record: stability.page(record, stability.cells(record["about"]["data"])))
        for data in stability.STEPS if stability.place(data).is_file()
    ),
    *(("docs/samplers.md", f"samplers on {data}", f"samplers_{data}", samplers.page) for data in samplers.RECIPES),
    ("README.md", "engines table", "engines_cpu", lambda record: engines.table(rows_of(record), record["machine"])),
    ("docs/performance.md", "dual pass table", "compiled_dual_cpu", compiled_dual.page),
    ("docs/performance.md", "training step", "training_step_cpu", training_step.page),
    ("docs/data.md", "data table", "data_cpu", lambda r: data_loading.table(r["samples_per_second"], r["machine"])),
    ("docs/memory.md", "teacher table", "teacher_cpu", teacher.table),
    ("docs/memory.md", "memory plan", "memory_plan", planned),
    ("docs/memory.md", "memory check", "memory_plan",
     lambda record: memory_plan.check_table([memory_plan.Checked(**one) for one in record["check"]])),
    *([("docs/results/growth.md", "growth", "growth", growth.page)] if growth.RECORD.is_file() else []),
    ("docs/results/second_opinion.md", "second opinion", "second_opinion", second_opinion.page),
    ("docs/results/what_it_takes.md", "what it takes", "what_it_takes", taken),
    ("docs/memory.md", "small cards", "small_cards", lambda record: small_cards.table(record["plans"])),
    ("docs/memory.md", "small cards check", "small_cards",
     lambda record: small_cards.check_table(small_cards.checks(record))),
    ("docs/few_step_lora.md", "lora digits table", "lora_digits", lora_digits.table),
    *([("docs/results/stability.md", "larger networks", "evidence_gpu", gpu_evidence.page)]
      if gpu_evidence.RECORD.is_file() else []),
    ("docs/add_a_diffusers_model.md", "described classes", "described", described.table),
    ("docs/wan.md", "wan digits table", "wan_digits", wan_digits.page),
    ("docs/emoji.md", "emoji table", "emoji", lambda record: emoji_pictures.table(record["figures"], EMOJI)),
    ("README.md", "demo table", "demo_cpu",
     lambda r: demo.table(r["results"], r["machine"], r["seconds"], r["cpu_seconds"] or 0)),
]  # fmt: skip
BEGINS = {"emoji table"}  # what stands below it in the block counts pictures, which no record keeps


def block(page: str, name: str) -> str:
    text = (ROOT / page).read_text()
    found = re.search(
        rf"<!-- {re.escape(name)}(?: -->|:[^\n]*-->)\n(.*?)\n<!-- end of {re.escape(name)} -->", text, re.S
    )
    assert found is not None, f"{page} has no block '{name}'"
    return found[1]


@pytest.mark.parametrize(("page", "name", "record", "made"), BLOCKS, ids=[f"{b[0]}: {b[1]}" for b in BLOCKS])
def test_a_block_is_what_its_record_says(page, name, record, made):
    shown, said = block(page, name), made(json.loads((RESULTS / f"{record}.json").read_text()))
    assert shown.startswith(said) if name in BEGINS else shown == said


def test_gpu_blocks_are_what_the_latest_record_says_or_that_there_is_none():
    for page in ("README.md", "docs/performance.md"):
        assert block(page, "gpu table") == gpu_table.table(recorded())
    assert block("docs/compatibility.md", "gpu runs") == gpu_table.runs(recorded())
    if not gpu_evidence.RECORD.is_file():
        assert block("docs/results/stability.md", gpu_evidence.NAME) == gpu_evidence.page(None)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_record_names_its_machine_and_shows_up_somewhere(path):
    about = json.loads(path.read_text())["machine"]
    assert about["cpu"] and about["cores"] and about["torch"]
    assert path.stem in {record for _, _, record, _ in BLOCKS} or path.stem.startswith("gpu_")


@pytest.mark.parametrize(
    "name", ["forgetting", "growth", "second_opinion", *(f"stability_{data}" for data in stability.STEPS)]
)
def test_what_is_claimed_has_a_command_a_commit_seeds_and_a_spread(name):
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        pytest.skip("not measured")
    page = next(block(page, title) for page, title, record, _ in BLOCKS if record == name)
    record = json.loads(path.read_text())
    commit = r"[0-9a-f]{7,}\+?"
    assert re.search(
        r"`python benchmarks/\w+\.py[^`]*` on .+, torch [\d.]+\S*, \d{4}-\d\d-\d\d, "
        rf"commit {commit}(, later rows {commit})*\.$",
        page,
    )
    assert f"{len(record['about']['seeds'])} seeds" in page and " ± " in page
    assert {row["seed"] for row in record["rows"] if "seed" in row} == set(record["about"]["seeds"])
