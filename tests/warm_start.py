"""`python SCRIPT words...` and `python -c CODE` in forks of a process that has imported the slow libraries already.

    python tests/warm_start.py

reads one job per line, {"words", "folder", "environment", "output", "seconds"}, runs it as an interpreter of its own
would (search path, environment, exit), writes what it prints to the file `output` and answers with its exit code.
Nothing of this project is imported before the fork: every job may have another copy of it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from typing import Any

import hydra  # noqa: F401
import lightning  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch  # noqa: F401
import torchvision  # noqa: F401


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(json.loads(line))
            return  # and end as any interpreter does
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(job: dict[str, Any]) -> None:
    """Run a job in this process."""
    signal.alarm(job["seconds"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    script, *_ = words = job["words"]
    ahead = [path for path in job["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = ["" if script == "-c" else os.path.dirname(os.path.abspath(script)), *ahead]
    if script == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
