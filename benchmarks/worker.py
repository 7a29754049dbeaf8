"""A process that measures: `python worker.py '{"measure": "time" | "memory", ...}'` prints what it found as JSON.

`time` runs several workloads in turns in one process, so that a busy neighbour slows all of them alike. `memory` runs
each workload in a process that has done nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from counting import LiveBytes
from workloads import Workload


def build(workload: str, settings: dict[str, Any]) -> Workload:
    """`module:function`, called with the settings."""
    module, _, function = workload.partition(":")
    torch.manual_seed(0)
    return getattr(importlib.import_module(module), function)(**settings)


def time_in_turns(workload: str, cases: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step, by case; a first round warms up and is not counted."""
    built = {name: build(workload, settings) for name, settings in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, work in built.items():
            work.forget()
            start = time.process_time()
            work.step()
            if turn:
                seconds[name].append(time.process_time() - start)
            work.forget()
    return seconds


def memory(workload: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Peaks of one step of each case in bytes, gradients included; each in a process that has done nothing else."""

    def measured(settings: dict[str, Any]) -> Any:
        return _forked(lambda: _peaks(build(workload, settings)))

    return {name: measured(settings) for name, settings in cases.items()}


def _peaks(work: Workload) -> dict[str, int]:
    """Of the process above its idle state, and counted."""
    idle = _status("VmRSS")
    _reset_peak()
    work.step()
    process = _status("VmHWM") - idle
    work.forget()
    with LiveBytes() as counter:
        work.step()
    return {"process": process, "counted": counter.peak}


def _forked(function: Callable[[], Any]) -> Any:
    """What the function returns in a copy of this process (which has loaded PyTorch and computed nothing yet)."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(writing, json.dumps(function()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = answer.read()
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
    return json.loads(found)


def _status(field: str) -> int:
    """A figure of the process' memory in bytes, from Linux; elsewhere the largest resident set so far."""
    status = Path("/proc/self/status")
    if not status.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    """Let the peak start from now, where the kernel allows it; else it is the peak since the process began."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    measures: dict[str, Callable[..., Any]] = {"time": time_in_turns, "memory": memory}
    measure = measures[task.pop("measure")]
    print(json.dumps(measure(**task)))


if __name__ == "__main__":
    main()
