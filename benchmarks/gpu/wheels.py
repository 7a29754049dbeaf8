"""Packages that a machine without a network was sent: the wheels of `.whl/`, unpacked into a temporary folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


def unpack(wheels: Path, needed: str = "hydra") -> str | None:
    """Put the wheels on the path of this process and of those that it starts; returns what went wrong, if anything.

    Nothing is asked of a network, and nothing done where the package `needed` is importable. What is importable already
    stays in charge: the folder comes last.
    """
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if not found or find_spec(needed):
        return None
    folder = tempfile.mkdtemp(prefix="flowanchor_wheels_")
    options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--target", folder]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *map(str, found)], capture_output=True, text=True
    )
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
    return None if done.returncode == 0 else (done.stderr or done.stdout)[-400:]
