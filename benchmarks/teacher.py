"""What a guided teacher costs: its weights in float32 or bfloat16, its two conditions in two calls or in one.

    python benchmarks/teacher.py            # minutes; refreshes docs/memory.md
    python benchmarks/teacher.py --quick    # a tiny network, one round; refreshes nothing

One velocity of one sample by a frozen LightningDiT (4 blocks, width 384, 256 tokens) under autocast to bfloat16, in
turns, on one thread: CPU seconds, and bytes that it allocates at most beside its weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from flowanchor.checkpoints.load import store_low
from flowanchor.interfaces import Question
from flowanchor.jumps.guidance import Guidance, _side_by_side
from harness import RESULTS, ROOT, machine, markdown, readings, refresh, write_json
from workloads import Workload, lightningdit

CASES = {
    "weights in float32, two calls": {"low": False, "together": False},
    "weights in bfloat16, two calls": {"low": True, "together": False},
    "weights in bfloat16, one call": {"low": True, "together": True},
}
QUICK = {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": 4}


def velocity(low: bool, together: bool, batch: int = 1, depth: int = 4, **size: Any) -> Workload:
    """A guided velocity of `batch` samples."""
    network = lightningdit(depth=depth, **size).eval().requires_grad_(False)
    if low:
        store_low(network, torch.bfloat16)
    x, t = torch.randn(batch, *network.sample_shape), torch.rand(batch)
    labels, guidance = torch.randint(0, 10, (batch,)), Guidance(1.75)

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            if together:
                first, second = _side_by_side(network, x, Question(t), labels, network.conditioning.null(labels))
                second + 1.75 * (first - second)
            else:
                guidance.velocity(network, x, Question(t), labels, t)

    return Workload(step, network)


def table(record: dict[str, Any]) -> str:
    found = record["measured"]
    base = found[next(iter(CASES))]["cpu_seconds"]
    rows = [
        [name, f"{found[name]['weights'] / 1e6:.0f}", f"{found[name]['cpu_seconds'] / base:.2f}",
         f"{found[name]['counted_peak'] / 1e6:.0f}"] for name in CASES
    ]  # fmt: skip
    about = record["machine"]
    note = (
        f"CPU time relative to the first; measured by `benchmarks/teacher.py` on {about['cpu']}, one thread, torch "
        f"{about['torch']}, {about['date']}, commit {about['commit']}."
    )
    return "\n\n".join([markdown(["a guided teacher", "weights MB", "CPU time", "peak beside them, MB"], rows), note])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a guided teacher.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny network, one round; refreshes nothing")
    chosen = parser.parse_args()
    size = QUICK if chosen.quick else {}
    found = readings(
        "teacher:velocity", {k: {**v, **size} for k, v in CASES.items()}, 1 if chosen.quick else chosen.rounds
    )
    measured = {name: {**vars(one), "weights": _held(CASES[name]["low"], size)} for name, one in found.items()}
    record = {"machine": machine(), "measured": measured}
    print(table(record))
    if not chosen.quick:
        write_json(RESULTS / "teacher_cpu.json", record)
        refresh(ROOT / "docs" / "memory.md", "teacher table", table(record))


def _held(low: bool, size: dict[str, Any]) -> int:
    network = lightningdit(**{"depth": 4, **size})
    if low:
        store_low(network, torch.bfloat16)
    return sum(p.nbytes for p in network.parameters())


if __name__ == "__main__":
    main()
