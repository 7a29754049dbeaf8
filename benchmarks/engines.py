"""`make bench`: what the tangent engines cost, against the bars they were built for. Each claim is a file in claims/.

    python benchmarks/engines.py                          # about ten minutes on 2 cores; refreshes the README
    python benchmarks/engines.py --only growth attention  # prints these, and leaves files alone
    python benchmarks/engines.py --quick --results DIR    # a tiny network: shows that it runs, the figures mean nothing

Every engine runs on one thread. CPU time is the median over rounds in which the engines take turns in one process. The
peak of a process is what its memory grows above its idle state, gradients included, in a process of its own; the
counted peak is the sum of bytes of all tensors alive at a time that the step made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from claims import attention, engine_cost, facm_step, growth, sharded
from harness import RESULTS, ROOT, Claim, Row, machine, markdown, refresh, write_json

CLAIMS = {module.NAME: module for module in (engine_cost, growth, facm_step, attention, sharded)}
QUICK = {"depth": 2, "hidden_size": 64, "num_heads": 4, "batch": 2}
QUICK_ATTENTION = {"tokens": 512, "heads": 2, "head_size": 24}
HEADER = ("claim", "figure", "measured", "bar", "met")
REFERENCE = "12-block LightningDiT, width 384, 256 tokens, batch 8, fp32, forward and backward"


def run(names: list[str], rounds: int, quick: bool) -> dict[str, Claim]:
    """The claims of these names, measured one after the other."""
    found = {}
    for name in names:
        size: dict[str, Any] = {} if not quick else QUICK_ATTENTION if name == "attention" else QUICK
        print(f"measuring {name} ...", flush=True)
        found[name] = CLAIMS[name].measure(1 if quick else rounds, size)
    return found


def table(rows: list[Row], about: dict[str, Any], quick: bool = False) -> str:
    """The rows as Markdown, with what stands beside them."""
    if quick:
        trial = "A trial on a tiny network: the figures and the bars mean nothing here."
        return "\n\n".join([markdown(HEADER, [row.cells() for row in rows]), trial])
    bars = [row for row in rows if row.bar is not None]
    missed = sum(not row.holds for row in bars)
    verdict = f"{missed} of {len(bars)} bars are missed." if missed else "Every bar is met."
    note = (
        f"{verdict} Ratios, smaller is better; {REFERENCE}, where nothing else is said; peaks include the gradients. "
        f"Measured by `make bench` on {about['cpu']}, one thread per process, torch {about['torch']}, "
        f"{about['date']}, commit {about['commit']}."
    )
    return "\n\n".join([markdown(HEADER, [row.cells() for row in rows]), note])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the tangent engines against their bars.")
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), help="these claims; prints and writes nothing else")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per engine")
    parser.add_argument("--quick", action="store_true", help="a tiny network, one round; refreshes nothing")
    parser.add_argument("--results", type=Path, help="write the record into this folder instead of benchmarks/results")
    arguments = parser.parse_args()
    claims = run(arguments.only or list(CLAIMS), arguments.rounds, arguments.quick)
    about = machine()
    rows = [row for claim in claims.values() for row in claim.rows]
    text = table(rows, about, arguments.quick)
    print(text)
    record = {"machine": about, "rows": rows, "measured": {name: claim.measured for name, claim in claims.items()}}
    if arguments.results is not None:
        write_json(arguments.results / "engines_cpu.json", record)
    elif not arguments.only and not arguments.quick:
        write_json(RESULTS / "engines_cpu.json", record)
        refresh(ROOT / "README.md", "engines table", text)


if __name__ == "__main__":
    main()
