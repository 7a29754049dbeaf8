"""Who may train in a folder: one process, and the next one after its death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from multiprocessing import get_context

import pytest

from flowanchor import run_lock
from flowanchor.errors import ConfigError
from flowanchor.run_lock import LOCK, Holder, RunLock, _read


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "SILENCE", 0.6)


def left_by(folder, age=0.0, **changes):
    """A lock that a process of the given kind has left."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    me = Holder.this_process()
    holder = replace(me, **{"token": "theirs", "host": "other", "pid": ended.pid, "started": "1", **changes})
    (folder / LOCK).write_text(json.dumps(holder.__dict__))
    os.utime(folder / LOCK, (time.time() - age, time.time() - age))
    return holder


def taken(folder):
    lock = RunLock(folder)
    lock.take()
    try:
        assert _read(folder / LOCK) == lock.me and not lock.lost
    finally:
        lock.release()
    assert not list(folder.iterdir())


def test_a_second_one_is_told_who_it_is(tmp_path):
    first = RunLock(tmp_path)
    first.take()
    sentence = (
        rf"\(process {os.getpid()} on .*, since 20.*\): wait for it, end it, or pick another name=NAME .*{LOCK}\.$"
    )
    with pytest.raises(ConfigError, match=sentence):
        RunLock(tmp_path).take()
    first.release()
    taken(tmp_path)


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "frozen"])
def test_a_process_of_this_machine_is_looked_at(tmp_path, kill):
    """Not its beats: a frozen one still holds its folder; a killed one never does, though it be a zombie."""

    def hold() -> None:
        RunLock(tmp_path).take()
        time.sleep(60)

    child = get_context("fork").Process(target=hold, daemon=True)
    child.start()
    while _read(tmp_path / LOCK) is None:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL if kill else signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, (os.WEXITED if kill else os.WSTOPPED) | os.WNOWAIT)  # it stays a zombie
    try:
        if kill:
            taken(tmp_path)
        else:
            os.utime(tmp_path / LOCK, (0, 0))
            with pytest.raises(ConfigError, match=f"process {child.pid} on"):
                RunLock(tmp_path).take()
    finally:
        child.kill()
        child.join()


def test_a_number_that_another_process_has_by_now(tmp_path):
    left_by(tmp_path, pid=os.getpid())
    taken(tmp_path)


@pytest.mark.parametrize("machine", ["another boot", None])
def test_another_machine_is_told_by_its_signs_of_life(tmp_path, machine):
    left_by(tmp_path, age=1.0, machine=machine)
    taken(tmp_path)
    left_by(tmp_path, machine=machine)
    began = time.monotonic()
    taken(tmp_path)
    assert time.monotonic() - began >= 0.4, "it was given the time for one"
    left_by(tmp_path, machine=machine)
    alive = threading.Timer(0.2, lambda: os.utime(tmp_path / LOCK))
    alive.start()
    with pytest.raises(ConfigError, match="on other, since"):
        RunLock(tmp_path).take()
    alive.join()


@pytest.mark.parametrize(("restarts", "free"), [("1", True), ("0", False)])
def test_a_requeued_job_knows_its_own(tmp_path, monkeypatch, restarts, free):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    left_by(tmp_path, machine="another boot", job="77", restarts=0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(run_lock, "SILENCE", 20.0)
    if free:
        taken(tmp_path)  # at once
    else:
        threading.Timer(0.2, lambda: os.utime(tmp_path / LOCK)).start()
        with pytest.raises(ConfigError):  # two steps of one job at the same time
            RunLock(tmp_path).take()


def test_of_many_that_find_a_dead_one_a_single_one_goes_on(tmp_path):
    left_by(tmp_path, machine=Holder.this_process().machine)
    locks, outcome = [RunLock(tmp_path) for _ in range(8)], []

    def attempt(lock):
        try:
            lock.take()
            outcome.append(lock)
        except ConfigError:
            pass

    threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcome) == 1
    outcome[0].release()
    assert not list(tmp_path.iterdir())


def test_a_late_one_leaves_the_faster_one_its_lock(tmp_path, monkeypatch):
    """And never is there a moment without any lock, in which a third one could begin."""
    left_by(tmp_path, machine=Holder.this_process().machine)
    dead = run_lock._read(tmp_path / LOCK)
    faster, late, third = (RunLock(tmp_path) for _ in range(3))
    read = run_lock._read

    def watched(*given, **named):
        assert not third._create()
        return read(*given, **named)

    monkeypatch.setattr(run_lock, "_read", watched)
    faster.take()
    assert not late._take_over(dead)
    with pytest.raises(ConfigError, match="Another process trains"):
        late.take()
    assert read(tmp_path / LOCK) == faster.me
    monkeypatch.setattr(run_lock, "_read", read)
    faster.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [{"token": "../../x"}, {"token": "\0" * 999}, {"token": 5}, {"pid": "5"}, {"pid": -1}, {"restarts": 2**80}],
)
def test_a_lock_of_unknown_origin_is_taken_over_and_reaches_nothing_else(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(run_lock, "SILENCE", 0.3)
    path = tmp_path / "a" / "run" / LOCK
    path.parent.mkdir(parents=True)
    left = {**asdict(Holder.this_process()), "token": "theirs", "started": "1", **changes}
    path.write_text(json.dumps(left))
    os.utime(path, (1, 1))
    taken(path.parent)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", path.parent]


def test_one_that_was_killed_while_it_took_over_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 0.3)
    left_by(tmp_path, machine=Holder.this_process().machine)
    dead = run_lock._read(tmp_path / LOCK)
    RunLock(tmp_path)._claim_of(dead).touch()
    taken(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_that_was_taken_for_dead_stops(tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    left_by(tmp_path)
    time.sleep(0.3)
    with pytest.raises(ConfigError, match="on other, since .* trains in .* as well"):
        lock.check()
    lock.release()
    assert _read(tmp_path / LOCK).host == "other", "the other one keeps its lock"


def test_a_lock_that_was_tidied_away_comes_back(tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    (tmp_path / LOCK).unlink()
    time.sleep(0.3)
    assert _read(tmp_path / LOCK) == lock.me
    lock.release()


def test_half_a_lock(tmp_path):
    (tmp_path / LOCK).write_text("{")
    os.utime(tmp_path / LOCK, (0, 0))
    taken(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written .*hydra.run.dir=FOLDER"):
        RunLock(tmp_path / "file").take()
