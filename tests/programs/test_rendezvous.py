"""What goes wrong between the processes of a run, as sentences; and a process ends with the one that started it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from flowanchor.base.causes import unwrapped
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.programs.messages import explain
from flowanchor.programs.rendezvous import check_meeting_point
from flowanchor.strategies.watchdog import cause_of

SRC = Path(__file__).parents[2] / "src"


def sentence(error: BaseException) -> str | None:
    return explain(error, "train", "pkg://flowanchor.conf", [])


def met(rank: int, host: str, port: int) -> str | None:
    with pytest.raises(dist.DistError) as caught:
        dist.TCPStore(host, port, 2, rank == 0, timeout=timedelta(seconds=1))
    return sentence(caught.value)


def test_a_port_in_use():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        told = met(0, "127.0.0.1", port)
    assert told == (
        f"Port {port}, at which the processes of this run are to meet, cannot be opened (address already in use): set "
        "the environment variable MASTER_PORT to a free one."
    )


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert met(1, "127.0.0.1", port).startswith(f"Nothing answers at 127.0.0.1:{port}, where the first process of")
    assert met(0, "127.0.0.1", port).startswith("Only 1 of 2 processes came together within ")


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("MASTER_PORT", "abc", "MASTER_PORT=abc is no port: set it to a number"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999 is no port"),
        ("MASTER_ADDR", "no.such.host.invalid", "MASTER_ADDR=no.such.host.invalid has no address "),
    ],
)
def test_a_meeting_point_that_is_none(monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        check_meeting_point()


def of_ranks(*errors: BaseException) -> CheckpointException:
    return CheckpointException("write", {rank: _wrap_exception(error) for rank, error in enumerate(errors)})


def test_what_ranks_raised_while_they_wrote_is_told_as_of_one_process(monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert sentence(of_ranks(full, full)) == sentence(full) and "no space left on device" in sentence(full)
    assert sentence(of_ranks(CheckpointError("It is damaged: take another."))) == "It is damaged: take another."
    assert cause_of(of_ranks(full)) == "OSError: [Errno 28] No space left on device"
    monkeypatch.setenv("RANK", "1")
    assert unwrapped(of_ranks(full, ValueError("mine"))).args == ("mine",)
    assert unwrapped(of_ranks(of_ranks(full))) is full
    assert unwrapped(full) is full


# -------------------------------------------------------------------------------------------------- orphaned processes

CHILD = "import os, time; {}; print(os.getpid(), flush=True); time.sleep(60)"
STARTER = """
import os, subprocess, sys
from flowanchor.base.start import LAUNCHER, launcher
os.environ[LAUNCHER] = {launcher}
subprocess.Popen([sys.executable, "-c", {child!r}])
{then}
"""
BEGIN = "import flowanchor.programs"


@pytest.mark.parametrize(
    "launcher, environment, child, ends",
    [
        ("launcher()", {"LOCAL_RANK": "1"}, BEGIN, True),  # as Lightning starts it
        ("''", {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, BEGIN, True),  # as torchrun does
        ("launcher()", {}, "time.sleep(1.5); " + BEGIN, False),  # a stranger, by then: another process' child
        ("launcher()", {"LOCAL_RANK": "1"}, "time.sleep(1.5); " + BEGIN, True),  # too late to look who started it
        ("''", {}, BEGIN, False),  # by a shell that exits
    ],
)
@pytest.mark.timeout(45)
@pytest.mark.cold
def test_a_rank_ends_with_the_process_that_started_it(launcher, environment, child, ends):
    starter = STARTER.format(launcher=launcher, child=CHILD.format(child), then="__import__('time').sleep(0.8)")
    given = {**os.environ, **environment, "PYTHONPATH": str(SRC)}
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, env=given)
    assert process.wait(timeout=60) == 0 and process.stdout is not None
    if ends:
        process.stdout.read()  # until the child, which has it too, has ended: long before its minute is over
        return
    child_id = int(process.stdout.readline())
    time.sleep(2)
    os.kill(child_id, signal.SIGKILL)  # raises where it has ended
