"""Packages that a machine without a network was sent: the wheels of `.whl/`, unpacked into a temporary folder.

python benchmarks/gpu/wheels.py    # where the project is installed: what to send, for `pip download`
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

THERE = ("torch", "triton", "torchvision", "lightning")  # must fit the card, or are light: with what they need
PURE = ("antlr4-python3-runtime",)  # has no wheel in the index: `pip wheel`


def unpack(wheels: Path) -> str | None:
    """Put the wheels of packages that are not installed on the path of this process and of those that it starts.

    Nothing is asked of a network. What is importable already stays in charge: the folder comes last. Returns what went
    wrong, if anything.
    """
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    missing = [wheel for wheel in found if not _installed(wheel.name.partition("-")[0])]
    if not missing:
        return None
    folder = tempfile.mkdtemp(prefix="flowanchor_wheels_")
    options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--target", folder]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *map(str, missing)], capture_output=True, text=True
    )
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
    return None if done.returncode == 0 else (done.stderr or done.stdout)[-400:]


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def needed() -> list[str]:
    """What the project needs beside PyTorch, Triton and Lightning, in the versions that are installed here."""
    others = _with_what_they_need(["flowanchor"]) - _with_what_they_need(THERE) - {"flowanchor"}
    return sorted(f"{name}=={distribution(name).version}" for name in others)


def _with_what_they_need(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found or not _installed(name):
            continue
        found.add(name)
        asked = [Requirement(line) for line in distribution(name).requires or []]
        todo += [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


if __name__ == "__main__":
    print(*(package for package in needed() if not package.startswith(PURE)))
