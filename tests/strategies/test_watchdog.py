"""A rank that dies ends the others within seconds, with the cause on screen; healthy ranks are left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from flowanchor.errors import ConfigError
from flowanchor.strategies.watchdog import RankWatchdog, cause_of

ROOT = Path(__file__).parents[2]
HOST = re.escape(socket.gethostname())
UNEXPLAINED = r"its process ended without saying why \(killed, out of memory or crashed\)"

# Rank `guilty` does what `deed` names while the other one waits for it: in a collective, or "deaf", as if in one that
# never notices anything.
RANK = """
import datetime, json, os, pathlib, signal, sys, time, traceback
import torch, torch.distributed as dist
from flowanchor.strategies import watchdog as module

def run(deed, guilty, waits, **rendezvous):
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10), **rendezvous)
    rank = dist.get_rank()
    module.GRACE = 3.0
    with module.RankWatchdog(timeout=3.0, interval=0.5) as watchdog:
        dist.all_reduce(torch.ones(1))
        if rank == guilty:
            pathlib.Path("time").write_text(str(time.time()))
            do(deed, watchdog)
        elif waits == "deaf":
            time.sleep(600)
        if deed == "leaves early":
            time.sleep(4)
        else:
            dist.all_reduce(torch.ones(1))
    print(f"rank {rank} is done", flush=True)

def do(deed, watchdog):
    if deed == "raises":
        raise ValueError("the data of this rank\\n  is broken.")
    if deed == "never ends":
        watchdog.fail(ValueError("no way out"))
        time.sleep(600)
    if deed == "dies beside a worker" and os.fork() == 0:
        time.sleep(10)
        os._exit(0)
    if deed.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "freezes":
        os.kill(os.getpid(), signal.SIGSTOP)
    if deed == "takes long":
        time.sleep(5)
    if deed == "leaves early":
        watchdog.stop()
"""

# Two forked processes per scenario, all at once: PyTorch is imported once, and they mostly wait.
SCENARIOS_AT_ONCE = """
def rank_of(folder, rank, scenario):
    code = 1
    try:
        os.chdir(folder)
        output = os.open(f"said_{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        run(*scenario, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)

scenarios = json.loads(sys.argv[1])
running = {}
for number, scenario in enumerate(scenarios):
    folder = pathlib.Path(str(number)).absolute()
    folder.mkdir()
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            rank_of(folder, rank, scenario)
        running[pid] = (number, rank)
ended = [[None, None] for _ in scenarios]
latest = time.time() + 60
while running and time.time() < latest:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid in running:
        number, rank = running.pop(pid)
        ended[number][rank] = (os.waitstatus_to_exitcode(status), time.time())
        if scenarios[number][0] == "freezes" and rank != scenarios[number][1]:
            os.kill(next(p for p in running if running[p] == (number, 1 - rank)), signal.SIGCONT)
    time.sleep(0.02)
for pid in running:
    os.kill(pid, signal.SIGKILL)
print(json.dumps(ended))
"""

SCENARIOS = [  # deed, rank that does it, how the other one waits
    ("raises", 1, "collective"),
    ("raises", 1, "deaf"),
    ("raises", 0, "collective"),
    ("raises", 0, "deaf"),
    ("dies", 1, "collective"),
    ("dies", 1, "deaf"),
    ("dies", 0, "collective"),
    ("dies", 0, "deaf"),
    ("dies beside a worker", 1, "collective"),
    ("freezes", 0, "collective"),
    ("freezes", 1, "collective"),
    ("never ends", 1, "collective"),
    ("takes long", 0, "collective"),
    ("takes long", 1, "collective"),
    ("leaves early", 0, "collective"),
    ("leaves early", 1, "collective"),
]


class Ended(NamedTuple):
    codes: list[int]  # exit code of each rank
    said: list[str]  # what each rank printed
    passed: float  # seconds from the deed to the end of the other rank


def environment(**values: str) -> dict[str, str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **values}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], Ended]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(RANK + SCENARIOS_AT_ONCE)
    command = [sys.executable, "program.py", json.dumps(SCENARIOS)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {}
    for number, (scenario, ends) in enumerate(zip(SCENARIOS, json.loads(done.stdout), strict=True)):
        said = [(folder / str(number) / f"said_{rank}").read_text() for rank in (0, 1)]
        assert None not in ends, f"{scenario}: a rank never ended\n{said[0]}\n{said[1]}"
        began = float((folder / str(number) / "time").read_text())
        found[scenario] = Ended([code for code, _ in ends], said, ends[1 - scenario[1]][1] - began)
    return found


def having(*deeds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s[0] in deeds], ids=str)


@having("raises")
def test_an_exception_ends_the_others_with_its_words(outcomes, scenario):
    guilty, (codes, said, passed) = scenario[1], outcomes[scenario]
    sentence = rf"^Rank {guilty} \({HOST}\) died: ValueError: the data of this rank is broken; this rank ends with it.$"
    assert re.search(sentence, said[1 - guilty], re.M), said
    assert "Traceback" in said[guilty] and "  is broken." in said[guilty], "the culprit's own words are lost"
    assert "Traceback" not in said[1 - guilty], "the other rank has nothing to add"
    assert codes == [1, 1] and passed < 10


@having("dies", "dies beside a worker")
def test_a_killed_rank_ends_the_others(outcomes, scenario):
    guilty, (codes, said, passed) = scenario[1], outcomes[scenario]
    host = HOST if guilty else r"127\.0\.0\.1"  # with rank 0, the judge has gone: its address is all that is known
    assert re.search(
        rf"^Rank {guilty} \({host}\) died: {UNEXPLAINED}; this rank ends with it.$", said[1 - guilty], re.M
    ), said
    assert "Traceback" not in said[1 - guilty], "an error of the collective is no news"
    assert codes[guilty] == -signal.SIGKILL and codes[1 - guilty] == 1 and passed < 10


@having("freezes")
def test_a_frozen_rank_ends_the_others_and_then_itself(outcomes, scenario):
    guilty, (codes, said, passed) = scenario[1], outcomes[scenario]
    assert re.search(rf"^Rank {guilty} .* died: it gave no sign of life for 3 seconds; ", said[1 - guilty], re.M), said
    assert codes == [1, 1] and 2 < passed < 20


@having("never ends")
def test_a_rank_that_cannot_end_after_its_error_is_ended(outcomes, scenario):
    codes, said, passed = outcomes[scenario]
    assert "Rank 1" in said[0] and "died: ValueError: no way out; this rank ends with it." in said[0]
    assert "did not end within 3 seconds of its error, so it is ended." in said[1]
    assert codes == [1, 1] and passed < 15


@having("takes long", "leaves early")
def test_healthy_ranks_are_left_alone(outcomes, scenario):
    codes, said, _ = outcomes[scenario]
    assert codes == [0, 0], said
    assert all("is done" in text and "died" not in text for text in said)


def test_under_torchrun(tmp_path):
    (tmp_path / "program.py").write_text(RANK + 'run("raises", 1, "collective")')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert re.search(r"^Rank 1 .* died: ValueError: the data of this rank is broken; ", done.stderr, re.M), done.stderr
    root_cause = done.stderr[done.stderr.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 ", root_cause), root_cause
    assert done.returncode == 1


CALLBACK = """
import os, signal
import lightning.pytorch as pl

class Dies(pl.Callback):
    def __init__(self, rank, how):
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is gone")
"""


@pytest.mark.parametrize("rank, how", [(1, "raises"), (0, "killed")])
def test_a_training_run_ends_with_the_cause(tmp_path, rank, how):
    (tmp_path / "dies.py").write_text(CALLBACK)
    command = [
        sys.executable, str(ROOT / "src" / "train.py"), "backbone.depth=1", "backbone.hidden_size=16",
        "backbone.num_heads=2", "logger=none", "ema=none", "data.batch_size=8", "~callbacks.sample_grid",
        "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=50",
        "trainer.limit_val_batches=0", "+callbacks.dies._target_=dies.Dies", f"+callbacks.dies.rank={rank}",
        f"+callbacks.dies.how={how}",
    ]  # fmt: skip
    values = environment()
    values["PYTHONPATH"] = os.pathsep.join([str(tmp_path), values["PYTHONPATH"]])
    # An orphaned child keeps the pipe open: it ends by itself, or this times out.
    done = subprocess.run(command, cwd=tmp_path, env=values, capture_output=True, text=True, timeout=90)
    cause = UNEXPLAINED if how == "killed" else "OSError: the disk is gone"
    assert re.search(rf"^Rank {rank} \(.*\) died: {cause}; this rank ends with it.$", done.stderr, re.M), done.stderr
    assert done.returncode != 0
    if how == "raises":
        assert "Traceback" in done.stderr and "Error: the disk is gone" in done.stderr


def test_one_process_is_not_watched():
    with RankWatchdog() as watchdog:
        watchdog.fail(ValueError("nobody listens"))  # returns at once


def test_timeouts_that_would_kill_healthy_ranks_are_refused():
    with pytest.raises(ConfigError, match="callbacks.rank_watchdog.timeout=30"):
        RankWatchdog(timeout=3.0, interval=2.0)
    assert RankWatchdog(timeout=None).timeout is None


def test_a_cause_is_one_short_line():
    assert cause_of(ValueError("one\n two")) == "ValueError: one two"
    assert cause_of(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(cause_of(ValueError("x" * 10_000))) < 600
