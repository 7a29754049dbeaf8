"""Seconds of a processor by file of tests, with every process that a test starts: `make test ARGS=--cpu-seconds=FILE`.

Unlike the clock's, they hardly depend on what else the machine does. FILE gets a line per test and per program that it
started (tests/warm/start.py); the twenty files that take most are printed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_start import FILE, note, spent  # the file beside this one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FILE", help="write the seconds of a processor that each test takes")


def pytest_configure(config: pytest.Config) -> None:
    if (name := config.getoption("--cpu-seconds")) and FILE not in os.environ:
        Path(name).write_text("")
        os.environ[FILE] = os.path.abspath(name)
        config.add_cleanup(lambda: os.environ.pop(FILE))


def pytest_collection_finish(session: pytest.Session) -> None:
    note(spent(), "(collecting)")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = spent()
    try:
        return (yield)
    finally:
        note(spent() - before, item.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not (name := config.getoption("--cpu-seconds")):
        return
    files: Counter[str] = Counter()
    for line in Path(name).read_text().splitlines():
        seconds, _, test = line.partition(" ")
        files[test.partition("::")[0]] += float(seconds)  # type: ignore[assignment]
    terminalreporter.section(f"{sum(files.values()):.0f} seconds of a processor")
    for file, seconds in files.most_common(20):
        terminalreporter.write_line(f"{seconds:7.1f} {file}")
