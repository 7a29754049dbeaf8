"""The programs. What one needs is imported once its command line is composed: `--help`, a typo and the shell's
completion wait for no library."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from flowanchor.programs.launch import Task, program


def _later(module: str, name: str) -> Task[Any]:
    """The function of that name, imported when it is called."""

    def task(cfg: Any) -> Any:
        return getattr(importlib.import_module(module), name)(cfg)

    task.__module__, task.__name__ = module, name  # Hydra names the log file after the module
    return task


train = program("train", unfinished="before its first step, so there is nothing to save", doing="Training in")(
    _later("flowanchor.programs.train", "train")
)
sample = program("sample", doing="Drawing into")(_later("flowanchor.programs.sample", "sample"))
evaluate = program("eval", doing="Evaluating in")(_later("flowanchor.programs.evaluate", "evaluate_run"))
_encode = program("encode", doing="Encoding; the log goes to")(_later("flowanchor.programs.encode", "encode"))
report = program("report")(_later("flowanchor.programs.report", "report"))
demo = program("demo", doing="The demo, in")(_later("flowanchor.programs.demo", "demo"))
_convert = program("convert")(_later("flowanchor.programs.convert", "convert"))


def convert() -> None:
    """Its first word may be the action, as in `convert.py consolidate checkpoint=...`."""
    if len(sys.argv) > 1 and sys.argv[1].isidentifier():
        sys.argv[1] = f"action={sys.argv[1]}"
    _convert()


def encode() -> None:
    """Its `format` is a plain setting, kept as `layout`: by the other name Hydra means the options of convert.py."""
    sys.argv[1:] = [re.sub(r"^format=", "layout=", word) for word in sys.argv[1:]]
    _encode()
