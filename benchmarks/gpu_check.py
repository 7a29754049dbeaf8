"""`make gpu-check`: the tests that need a GPU, and the benchmark rows that were measured on none so far.

    python benchmarks/gpu_check.py                                       # where there is a CUDA device, < 10 minutes
    python benchmarks/gpu_check.py --device cpu --tiny --results FOLDER  # shows that it runs; the figures mean nothing
    python benchmarks/gpu_check.py --table                               # the README's rows, from what is recorded

It writes benchmarks/results/gpu_NAME.json and refreshes the README's rows. Nothing is imported but PyTorch, the engines
and LightningDiT, so that a machine without the project's other dependencies will do (PYTHONPATH=src, no installation).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from counting import LiveBytes
from flowanchor.errors import ConfigError
from harness import RESULTS, ROOT, machine, markdown, refresh, write_json
from workloads import ENGINES, Workload, attention_step, engine_step

XL = {"patch_size": 1, "hidden_size": 1152, "depth": 28, "num_heads": 16, "in_channels": 32}
NETWORKS: dict[int, dict[str, Any]] = {
    256: {**XL, "input_size": 16, "batch": 16},
    1024: {**XL, "input_size": 32, "batch": 4},
}
TINY_NETWORKS: dict[int, dict[str, Any]] = {
    16: {"input_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "batch": 2}
}
LENGTHS, TINY_LENGTHS = (256, 1024, 4096, 16384), (32, 64)
HEADS = (16, 72)  # number, size
WAYS = {
    "forward": "SDPA, forward only",
    "triton": "tangent, triton",
    "streaming": "tangent, streaming",
    "math": "tangent, math",
}
TOKENS_PER_BATCH = 2**14  # attention is measured at so many tokens in all
NETWORK = "LightningDiT-XL/1"
MISSING = "not measured"


class Meter:
    """Times and peaks on one device."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.cuda = device == "cuda"

    def seconds(self, work: Workload) -> float:
        """One step, from an idle device to an idle device."""
        work.forget()
        self._wait()
        start = time.perf_counter()
        work.step()
        self._wait()
        return time.perf_counter() - start

    def peak(self, work: Workload) -> int:
        """Bytes that a step needs above what was there before, gradients included."""
        work.forget()
        if not self.cuda:
            with LiveBytes() as counter:
                work.step()
            return counter.peak
        self._wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.step()
        self._wait()
        return torch.cuda.max_memory_allocated() - before

    def one(self, build: Callable[[], Workload]) -> dict[str, Any]:
        """Median seconds and peak of a workload, or why there are none."""
        try:
            work = build()
            peak = self.peak(work)  # also warms up
            self.seconds(work)
            seconds = [self.seconds(work) for _ in range(self.rounds)]
            work.forget()
            return {"seconds": statistics.median(seconds), "rounds": seconds, "peak": peak}
        except torch.OutOfMemoryError:
            return {"missing": "out of memory"}
        except ConfigError as refusal:
            return {"missing": MISSING, "because": str(refusal)}
        finally:
            if self.cuda:
                torch.cuda.empty_cache()

    def matrix_peak(self, size: int) -> float:
        """FLOP/s of a square bfloat16 matrix product, the most this card gives."""
        a, b = torch.randn(2, size, size, device=self.device, dtype=torch.bfloat16)
        work = Workload(lambda: a @ b)
        self.seconds(work)
        return 2 * size**3 / min(self.seconds(work) for _ in range(5))

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measure(device: str, tiny: bool) -> dict[str, Any]:
    """The engines on LightningDiT-XL/1, and attention by itself; bfloat16 throughout."""
    meter = Meter(device, 1 if tiny else 5)
    on: dict[str, Any] = {"device": device, "bfloat16": True}
    engines = {
        tokens: {name: meter.one(partial(engine_step, name, **size, **on)) for name in ENGINES}
        for tokens, size in (TINY_NETWORKS if tiny else NETWORKS).items()
    }
    attention = {}
    for tokens in TINY_LENGTHS if tiny else LENGTHS:
        batch = 1 if tiny else max(1, TOKENS_PER_BATCH // tokens)
        found = {kind: meter.one(partial(attention_step, kind, tokens, *HEADS, batch, **on)) for kind in WAYS}
        product = 2 * batch * HEADS[0] * tokens**2 * HEADS[1]  # FLOPs of one product
        for kind, one in found.items():
            if "seconds" in one:
                one["flops"] = (2 if kind == "forward" else 6) * product / one["seconds"]
        attention[tokens] = found
    return {
        "network": "a tiny LightningDiT" if tiny else NETWORK,
        "engines": engines,
        "attention": attention,
        "matrix_peak": meter.matrix_peak(64 if tiny else 8192),
    }


def run_tests() -> str:
    """The last line of `pytest -m gpu`; without Hydra only the tests of the engines can be collected."""
    if find_spec("pytest") is None:
        return "not run, pytest is missing"
    where = ["tests"] if find_spec("hydra") else ["tests/jvp"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rN", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        sys.exit("The tests that need a GPU did not pass (above): no figures were taken.")
    return re.sub(r" in [\d.]+s.*", "", lines[-1]).strip("= ")


# --------------------------------------------------------------------------------------------------------------- table


def table(record: dict[str, Any] | None) -> str:
    """Rows of one card; without a record they say that nobody measured them."""
    measured: dict[str, Any] = {"engines": {}, "attention": {}} if record is None else record["measured"]
    peak = measured.get("matrix_peak")
    blocks = [_engines(measured.get("network", NETWORK), measured["engines"]), _attention(measured["attention"], peak)]
    if record is None or peak is None:
        return "\n\n".join([*blocks, "No GPU has been measured with this code yet: `make gpu-check` fills these rows."])
    about = record["machine"]
    note = (
        f"Measured by `make gpu-check` on {about['device']}, torch {about['torch']}, {about['date']}, commit "
        f"{about['commit']}; bfloat16, peaks above the network's weights, gradients included. The card's matrix peak "
        f"is what a bfloat16 product reached in the same run: {peak / 1e12:.0f} TFLOP/s. Tests: {record['tests']}."
    )
    return "\n\n".join([*blocks, note])


def _engines(network: str, measured: dict[Any, Any]) -> str:
    sizes = measured or {tokens: {} for tokens in NETWORKS}
    rows = [[name, *(_cost(found.get(name)) for found in sizes.values())] for name in ENGINES]
    return markdown(["engine", *(f"{network}, {int(tokens):,} tokens: ms, GB" for tokens in sizes)], rows)


def _attention(measured: dict[Any, Any], matrix_peak: float | None) -> str:
    sizes = measured or {tokens: {} for tokens in LENGTHS}
    rows = [
        [f"N = {int(tokens):,}", *(_cost(found.get(kind), matrix_peak) for kind in WAYS)]
        for tokens, found in sizes.items()
    ]
    head = f"attention, {HEADS[0]} x {HEADS[1]}: ms, GB (share of the matrix peak)"
    return markdown([head, *WAYS.values()], rows)


def _cost(one: dict[str, Any] | None, matrix_peak: float | None = None) -> str:
    if one is None or "missing" in one:
        return MISSING if one is None else one["missing"]
    share = "" if matrix_peak is None else f" ({100 * one['flops'] / matrix_peak:.0f} %)"
    return f"{1e3 * one['seconds']:.1f}, {one['peak'] / 1e9:.2f}{share}"


def recorded() -> dict[str, Any] | None:
    """What was measured last on a GPU."""
    records = [json.loads(path.read_text()) for path in RESULTS.glob("gpu_*.json")]
    return max(records, key=lambda record: record["machine"]["date"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tests and benchmark rows of a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this program")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds; the figures mean nothing")
    parser.add_argument("--results", type=Path, help="write the record into this folder, and leave the README alone")
    parser.add_argument("--table", action="store_true", help="refresh the README's rows; measure nothing")
    chosen = parser.parse_args()
    if chosen.table:
        refresh(ROOT / "README.md", "gpu table", table(recorded()))
        return
    if chosen.device == "cpu" and chosen.results is None:
        sys.exit("A trial on the CPU must not pass for figures of a GPU: add --results FOLDER.")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("This machine has no CUDA device that PyTorch sees: run make gpu-check on one that has.")
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu (a trial, no GPU)"
    tests = run_tests() if chosen.device == "cuda" else "not run"
    about = {**machine(), "device": name}
    record = {"machine": about, "tests": tests, "measured": measure(chosen.device, chosen.tiny)}
    print(table(record))
    slug = re.sub(r"\W+", "_", name.lower()).strip("_")
    if chosen.results is not None:
        write_json(chosen.results / f"{'gpu_' if chosen.device == 'cuda' else ''}{slug}.json", record)
    elif not chosen.tiny:
        write_json(RESULTS / f"gpu_{slug}.json", record)
        refresh(ROOT / "README.md", "gpu table", table(recorded()))


if __name__ == "__main__":
    main()
