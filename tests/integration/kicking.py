"""Training runs that send signals to themselves; as a program, several of them at once, on several processes each.

    python kicking.py FOLDER SCENARIOS

Each scenario is {"name", "parts": [[words of train.py], ...], "processes"}: its parts run one after the other, in forks
of one process that has imported everything, with the environment that torchrun would give them. What each process
printed lands in FOLDER/<name>_<part>_<rank>; the exit codes are printed as {name: [[code of each rank] of each part]}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Kick(pl.Callback):
    """Sends signals, so many seconds apart, where a run has come to `hook` after `step` steps on a rank, once.

    `group`: to the whole process group, data workers too.
    """

    def __init__(
        self, hook: str, step: int, signals: list[int], rank: int = 0, pause: float = 0.0, group: bool = False
    ) -> None:
        self.step, self.signals, self.rank, self.pause, self.group = step, signals, rank, pause, group
        setattr(self, hook, self.kick)

    def kick(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        while self.signals:
            if self.group:  # by a process of its own, as in life
                subprocess.run(["kill", f"-{self.signals[0]}", "0"])
            else:
                os.kill(os.getpid(), self.signals[0])
            self.signals = self.signals[1:]
            time.sleep(self.pause)


def kick(hook: str, step: int, *signals: int, **settings: Any) -> list[str]:
    """The words that add a `Kick` to a run."""
    values = {"hook": hook, "step": step, "signals": [int(s) for s in signals], **settings}
    return ["+callbacks.kick._target_=kicking.Kick", *(f"+callbacks.kick.{k}={v}" for k, v in values.items())]


def become(rank: int, processes: int, port: int, words: list[str], output: Path) -> None:
    """Run train.py in this process, as one of several ranks."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1), os.dup2(handle, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="kicking",
    )  # fmt: skip
    sys.argv = ["train.py", *words]
    code: Any = 0
    try:
        from flowanchor.programs.train import main

        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def start(folder: Path, scenario: dict[str, Any], part: int) -> dict[int, int]:
    """Fork the processes of one part; process id -> rank. They are a process group of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun: dict[int, int] = {}
    for rank in range(scenario["processes"]):
        leader = next(iter(begun), 0)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, leader)
            become(
                rank, scenario["processes"], port, scenario["parts"][part], folder / f"{scenario['name']}_{part}_{rank}"
            )
        os.setpgid(pid, leader or pid)
        begun[pid] = rank
    return begun


# Imported before the forks, for all of them.
SHARED = (
    "flowanchor.programs.train", "flowanchor.callbacks.progress", "flowanchor.callbacks.rank_agreement",
    "flowanchor.callbacks.throughput", "flowanchor.plugins.backbones.lightningdit", "flowanchor.plugins.data.digits",
    "flowanchor.plugins.objectives.anchors.flow_matching", "flowanchor.plugins.objectives.composed",
    "flowanchor.plugins.objectives.intervals.expanded", "flowanchor.plugins.objectives.times.uniform",
    "flowanchor.plugins.samplers.flow", "flowanchor.plugins.teachers.data", "flowanchor.reporting.csv_logger",
    "flowanchor.strategies.chain_jvp",
)  # fmt: skip


def main() -> None:
    for name in SHARED:
        importlib.import_module(name)
    gc.freeze()  # or each fork would go through what it shares, and copy it
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    codes: dict[str, list[list[int | None]]] = {}
    running = {}
    for scenario in scenarios:
        codes[scenario["name"]] = [[None] * scenario["processes"] for _ in scenario["parts"]]
        running.update({pid: (scenario, 0, rank) for pid, rank in start(folder, scenario, 0).items()})
    while running:
        pid, status = os.wait()
        scenario, part, rank = running.pop(pid)
        ended = codes[scenario["name"]]
        ended[part][rank] = os.waitstatus_to_exitcode(status)
        if None not in ended[part] and part + 1 < len(scenario["parts"]):
            begun = start(folder, scenario, part + 1)
            running.update({pid: (scenario, part + 1, rank) for pid, rank in begun.items()})
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
