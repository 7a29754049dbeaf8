"""Programs under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Read where Triton is imported, and what the program is forked from (tests/warm) may have done that; compiled modules
# cannot be imported twice.
INTERPRETED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
for name in [name for name in sys.modules if name.partition(".")[0] == "triton" and not name.startswith("triton._C")]:
    del sys.modules[name]
"""


def interpreted(code: str, argument: str, folder: Path) -> Any:
    """What a program prints last, as JSON."""
    command = [sys.executable, "-c", INTERPRETED + code, argument]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
