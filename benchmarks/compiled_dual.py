"""What the dual pass of a block costs, compiled and eager: CPU seconds on one thread, taken in turns.

    python benchmarks/compiled_dual.py                    # some minutes; refreshes docs/performance.md
    python benchmarks/compiled_dual.py --quick --results DIR

Two blocks of a LightningDiT, 256 tokens, batch 2, and the embedding before them. Beside the passes, what no compiler
saves: the linear layers' products alone, and these with attention. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, Row, machine, markdown, refresh, seconds, write_json

KINDS = ("pytorch", "eager", "compiled", "products", "floor")
WORDS = {
    "eager": "eager", "compiled": "compiled", "pytorch": "eager with PyTorch's rules for sums and products",
    "products": "its products alone", "floor": "its products and attention alone",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {"width 384, float32": {}, "width 384, bfloat16": {"bfloat16": True}}
QUICK = {"hidden_size": 64, "num_heads": 4, "input_size": 4}
BAR = 0.7  # compiled / eager in float32


def compared(name: str, found: dict[str, list[float]]) -> list[Row]:
    """The rows of one case."""
    took = {kind: statistics.median(rounds) for kind, rounds in found.items()}
    pairs = (
        ("compiled", "eager"), ("products", "eager"), ("floor", "eager"), ("compiled", "floor"),
        ("compiled", "pytorch"), ("eager", "pytorch"),
    )  # fmt: skip
    bars = {"width 384, float32": {("compiled", "eager"): BAR}}.get(name, {})
    return [
        Row(
            f"dual pass, {name}, {WORDS[ours]} / {WORDS[theirs]}",
            "CPU time",
            (took[ours] / took[theirs],),
            bars.get((ours, theirs)),
        )
        for ours, theirs in pairs
    ]


def page(record: dict[str, Any]) -> str:
    """The table with what stands below it; of a record as it is measured, or as it is read."""
    about = record["machine"]
    rows = [row for name, found in record["measured"].items() for row in compared(name, found)]
    table = markdown(("claim", "figure", "measured", "bar", "met"), [row.cells() for row in rows])
    note = f"Ratios, smaller is better. {about['cpu']}, one thread, torch {about['torch']}, {about['date']}."
    return f"{table}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the dual pass, compiled and eager.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a tiny network, one round: the figures mean nothing")
    parser.add_argument("--results", type=Path, help="write the record into this folder, and refresh no page")
    chosen = parser.parse_args()
    measured = {}
    for name, settings in CASES.items():
        cases = {kind: {"kind": kind, **settings, **(QUICK if chosen.quick else {})} for kind in KINDS}
        measured[name] = seconds("workloads:dual_step", cases, 1 if chosen.quick else chosen.rounds)
    rows = [row for name, found in measured.items() for row in compared(name, found)]
    record = {"machine": machine(), "rows": rows, "measured": measured}
    print(page(record))
    write_json((chosen.results or RESULTS) / "compiled_dual_cpu.json", record)
    if chosen.results is None and not chosen.quick:
        refresh(ROOT / "docs" / "performance.md", "dual pass table", page(record))


if __name__ == "__main__":
    main()
