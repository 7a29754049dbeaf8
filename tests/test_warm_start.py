"""What tests start as `sys.executable` behaves as an interpreter of its own, and is one where a test is `cold`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, **options)


@linux
def test_libraries_are_there_and_ours_is_not() -> None:
    done = run("-c", "import sys; print('torch' in sys.modules, 'flowanchor' in sys.modules)")
    assert done.stdout == "True False\n"


@pytest.mark.cold
def test_a_cold_one_is_fresh() -> None:
    assert run("-c", "import sys; print('torch' in sys.modules)").stdout == "False\n"


def test_words_streams_folder_environment_and_path(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, sys, beside\n"
        "print(sys.argv, os.getcwd(), os.environ['X'], __name__, __file__, sys.stdin.read())\n"
        "print('wrong', file=sys.stderr)\n"
    )
    (tmp_path / "beside.py").touch()
    done = run("program.py", "a b", cwd=tmp_path, env={**os.environ, "X": "1"}, input="said")
    file = tmp_path / "program.py"
    assert done.stdout == f"['program.py', 'a b'] {tmp_path} 1 __main__ {file} said\n" and done.stderr == "wrong\n"
    again = run("-m", "program", cwd=tmp_path, env={**os.environ, "X": "2"}, input="")
    assert f"{tmp_path} 2 __main__ {file} " in again.stdout


@pytest.mark.parametrize(
    ("code", "ends", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'last')", 0, "last"),
        ("import os; os._exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'exit(5)']))", 5, ""),
    ],
)
def test_it_ends_as_an_interpreter_does(code: str, ends: int, said: str) -> None:
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (ends, said)


def test_an_exception_is_told() -> None:
    done = run("-c", "raise ValueError('a defect')")
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a defect\n")


def test_signals_and_the_parent() -> None:
    code = "import os, time; print(os.getppid(), os.getpid(), flush=True); time.sleep(60)"
    for number, ends in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -9)):
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        parent, _ = process.stdout.readline().split()
        assert int(parent) == os.getpid()
        process.send_signal(number)
        assert process.wait(timeout=60) == ends
        assert process.stdout.read() == "", "whatever had the pipe has ended with it"
