"""What a finished program says: where its results are, and what to type next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowanchor.base.paths import from_here


def command(program: str, *arguments: str) -> str:
    """A program called the way this one was: by its script, its installed name, or as a module."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":  # the command, which takes plain paths
        words = ["flowanchor", program] if shutil.which("flowanchor") else ["python", "-m", "flowanchor", program]
        arguments = tuple(argument.removeprefix("checkpoint=") for argument in arguments)
    elif script.name.startswith("flowanchor-"):
        words = [f"flowanchor-{program}"]
    elif script.suffix == ".py" and script.with_name(f"{program}.py").is_file():
        words = ["python", str(from_here(script.with_name(f"{program}.py")))]
    else:
        words = ["python", "-m", "flowanchor", program]
    return shlex.join([*words, *arguments])


def after_training(folder: Path, step: int, scores: Mapping[str, Any]) -> str:
    """Folder, last scores, and the commands that use them."""
    names = {"train/loss": "loss", "val/loss": "validation loss"}
    told = ", ".join(f"{label} {float(scores[name]):.4g}" for name, label in names.items() if name in scores)
    checkpoint = f"checkpoint={from_here(folder)}"
    return (
        f"Trained for {step} steps{f' ({told})' if told else ''}: {from_here(folder)}\n"
        f"  draw:    {command('sample', checkpoint)}\n"
        f"  measure: {command('eval', checkpoint)}"
    )
