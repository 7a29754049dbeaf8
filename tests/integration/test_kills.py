"""Fifty runs that are killed (SIGKILL) at random moments, most of them while they write: each goes on, bit for bit.

The run folder lies on another file system than the temporary folder, where this machine has one.
"""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS, SAVED_EVERY = 14, 3
GRACE = 20.0  # seconds for which a rank may outlive another

# Runs a program; counts what it opens for writing, moves and deletes in FOLDER, and dies a moment after the KILL_AT-th.
PROGRAM = """
import importlib, os, random, signal, sys, threading, time
folder, kill_at, name = os.environ["FOLDER"], int(os.environ["KILL_AT"]), sys.argv[1]
sys.argv = [f"src/{name}.py", *sys.argv[2:]]
seen = 0

def die():
    time.sleep(random.Random(kill_at).choice([0, 0, 0.0005, 0.002, 0.01]))
    os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    global seen
    if event == "open":
        path, mode, flags = arguments
        if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            return
    elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        return
    if isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(folder):
        seen += 1
        if seen == kill_at:
            threading.Thread(target=die).start()

sys.addaudithook(watch)
try:
    importlib.import_module(f"flowanchor.programs.{name}").main()
finally:
    with open(os.environ["COUNT"], "w") as file:
        file.write(str(seen))
"""


class Programs:
    """Starts PROGRAM as `python` or torchrun would, in one process or several."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    def run(self, words: list[str], folder: Path, kill_at: int = 0, ranks: int = 1, killed_rank: int = 0) -> list[int]:
        """Exit codes of the ranks; a negative one is the number of the signal that ended it."""
        port = _free_port() if ranks > 1 else 0
        started = []
        for rank in range(ranks):
            environment = {
                **os.environ, "OMP_NUM_THREADS": "1", "FOLDER": str(folder),
                "COUNT": str(self.scratch / f"count{rank}"),
                "KILL_AT": str(kill_at if rank == killed_rank else 0), "TMPDIR": str(self.scratch),
            }  # fmt: skip
            if ranks > 1:  # as torchrun starts them
                environment |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "kills",
                }  # fmt: skip
            with (self.scratch / f"output{rank}").open("w") as output:
                command = [sys.executable, "-c", PROGRAM, *words]
                started.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        return self._codes(started)

    def _codes(self, started: list[subprocess.Popen[bytes]]) -> list[int]:
        """Exit codes. Ranks that outlive another one that failed are ended as torchrun would, but not at once: a run
        ends by itself from the moment on when its processes know of each other."""
        until = time.monotonic() + 300
        alone_since = None
        while None in [process.poll() for process in started]:  # all are asked, whichever lives
            if any(process.returncode for process in started):
                alone_since = alone_since or time.monotonic()
            if time.monotonic() > min(until, (alone_since or until) + GRACE):
                for process in started:
                    process.kill()
            time.sleep(0.02)
        return [process.returncode for process in started]

    def printed(self, rank: int = 0) -> str:
        return (self.scratch / f"output{rank}").read_text(errors="replace")

    def count(self, rank: int = 0) -> int:
        return int((self.scratch / f"count{rank}").read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On another file system than the temporary folder, if there is one."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and memory.stat().st_dev != tmp_path.stat().st_dev:
        import tempfile

        with tempfile.TemporaryDirectory(dir=memory) as name:
            yield Path(name)
    else:
        yield tmp_path


def training(folder: Path, strategy: str) -> list[str]:
    several = [] if strategy == "auto" else ["trainer.devices=2", "trainer.accelerator=cpu"]
    return [
        "train", "objective=facm", "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2",
        f"data.batch_size={32 if strategy == 'auto' else 16}", f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=4",
        "trainer.limit_val_batches=1", "ema.snapshot_every=3", f"callbacks.last.every_n_train_steps={SAVED_EVERY}",
        "log_every_n_steps=1", "threads=1", "callbacks.sample_grid.every_n_steps=5", "callbacks.sample_grid.nfe=[1]",
        f"strategy={strategy}", f"hydra.run.dir={folder}", *several,
    ]  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for times and names."""
    from flowanchor.checkpoints.sharded import is_sharded, read_whole

    last = folder / "checkpoints" / "last.ckpt"
    content = read_whole(last) if is_sharded(last) else torch.load(last, weights_only=True)
    rows = list(csv.DictReader((folder / "csv" / "metrics.csv").open()))
    log = [{key: value for key, value in row.items() if "second" not in key and value} for row in rows]
    return {
        **{key: content[key] for key in ("global_step", "state_dict", "ema", "optimizer_states")},
        "snapshots": {file.name: load_file(file) for file in (folder / "ema_snapshots").glob("*.safetensors")},
        "log": [row for row in log if len(row) > 2],
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy, kills, per_run", [("auto", 24, 3), ("ddp", 12, 2), ("fsdp_chain_jvp", 12, 2)])
def test_killed_runs_equal_an_uninterrupted_one(
    programs: Programs,
    folder: Path,
    strategy: str,
    kills: int,
    per_run: int,
    assert_same: Callable[..., None],
) -> None:
    draw = random.Random(strategy)
    ranks = 1 if strategy == "auto" else 2
    whole = folder / "whole"
    assert programs.run(training(whole, strategy), whole, ranks=ranks) == [0] * ranks, programs.printed()
    wanted, writes = results(whole), programs.count()
    assert wanted["global_step"] == STEPS and writes > 40
    done = 0
    for number in range(kills // per_run):
        run = folder / f"run{number}"
        for _ in range(per_run):
            rank = draw.randrange(ranks)
            # Rank 0 writes most files, so that the other one is killed by the few that it writes, or not at all.
            at = draw.randint(1, writes) if rank == 0 else draw.randint(1, 8)
            codes = programs.run(training(run, strategy), run, at, ranks, rank)
            done += codes[rank] == -9
            together = all(code != 0 for code in codes) or codes == [0] * ranks
            over = f"`max_steps={STEPS}` reached" in programs.printed()  # killed at its own end: the others are done
            assert together or over, (codes, programs.printed())
        codes = programs.run(training(run, strategy), run, ranks=ranks)
        assert codes == [0] * ranks, programs.printed()
        found = results(run)
        # Lightning logs a step, and validates after it, when its checkpoint is written: a kill in between costs these.
        lost = [row for row in wanted["log"] if row not in found["log"]]
        assert all((int(row["step"]) + 1) % SAVED_EVERY == 0 for row in lost), lost
        assert_same(found, {**wanted, "log": [row for row in wanted["log"] if row not in lost]})
        left = [path for path in run.rglob("*") if path.name.endswith((".partial", ".damaged", ".diverged"))]
        assert not [path for path in left if path.stat().st_mtime < (run / "checkpoints/last.ckpt").stat().st_mtime]
    assert done >= kills // 2, "most of them must have been hit"
    assert not [path for path in programs.scratch.iterdir() if path.name.startswith("tmp")], "nothing in TMPDIR"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_evaluations_go_on(programs: Programs, folder: Path) -> None:
    """Caches (the metric's classifier, features of the reference) and partial results are written meanwhile."""
    run = folder / "run"
    assert programs.run(training(run, "auto"), run) == [0], programs.printed()

    def evaluation(name: str) -> list[str]:
        return [
            "evaluate", f"checkpoint={run}", "nfe=[1,2]", "num_samples=40", "batch_size=10", "metric.steps=3",
            f"metric.cache_dir={folder / name / 'cache'}", f"hydra.run.dir={folder / name / 'eval'}",
        ]  # fmt: skip

    def scores(name: str) -> Any:
        found = json.loads((folder / name / "eval" / "metrics.json").read_text())["results"]
        return [{key: value for key, value in line.items() if "second" not in key} for line in found]

    assert programs.run(evaluation("whole"), folder / "whole") == [0], programs.printed()
    writes, draw, done = programs.count(), random.Random(0), 0
    for number in range(4):
        name = f"part{number}"
        done += programs.run(evaluation(name), folder / name, draw.randint(1, writes)) == [-9]
        assert programs.run(evaluation(name), folder / name) == [0], programs.printed()
        assert scores(name) == scores("whole")
    assert done >= 2
