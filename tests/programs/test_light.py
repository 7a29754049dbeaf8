"""Nothing heavy is imported before it is needed, and Lightning only where something trains."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cold  # what a fresh interpreter imports
ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
save_checkpoint = _module.save_checkpoint

# What a program has imported when its command line is told to be wrong, or when it is done.
WATCHED = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as exit:
    code = exit.code
else:
    code = 0
heavy = ("torch", "lightning.pytorch", "lightning", "torchmetrics", "transformers", "matplotlib", "diffusers")
print("WATCHED", json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def watched(folder, program, *words):
    command = [sys.executable, "-c", WATCHED, str(ROOT / "src" / f"{program}.py"), *words]
    line = "python train.py objective="
    shell = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | shell)
    line = next(line for line in done.stdout.splitlines() if line.startswith("WATCHED"))
    code, heavy = json.loads(line.removeprefix("WATCHED "))
    return code, heavy, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [["--help"], ["objective=facn"], ["trainer.max_stepz=1"], ["-sc", "query=bash"], ["--version"]],
    ids=" ".join,
)
def test_the_command_line_waits_for_no_library(tmp_path, words):
    _, heavy, said = watched(tmp_path, "train", *words)
    assert not heavy and "Traceback" not in said, (heavy, said)
    assert "query=bash" not in words or "objective=facm" in said


def test_a_model_that_comes_along_is_drawn_with_little_more_than_torch(tmp_path):
    code = """
import json, sys
import flowanchor
images = flowanchor.load("digits").sample([3], steps=2)
print("HEAVY", json.dumps([list(images.shape), sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shape, modules = json.loads(done.stdout.split("HEAVY ")[1])
    assert shape == [1, 8, 8, 1]
    slow = {"lightning", "torchvision", "matplotlib", "sklearn", "hydra", "sympy", "diffusers", "transformers", "PIL"}
    slow |= {f"torch.{part}" for part in ("_dynamo", "_inductor", "distributed.tensor", "distributed.checkpoint")}
    assert not slow & set(modules)


def test_programs_that_do_not_train_never_import_lightning(tmp_path):
    run = save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for program, *words in (
        ("sample", f"checkpoint={run}", "num_samples=4", "name=s"),
        (
            "eval",
            f"checkpoint={run}",
            "num_samples=20",
            "nfe=1",
            "metric=random",
            f"metric.cache_dir={tmp_path}",
            "name=e",
        ),
        ("convert", f"checkpoint={run}", "output=one.safetensors"),
        ("report", f"runs={tmp_path}", "name=r"),  # which finds none
    ):
        code, heavy, said = watched(tmp_path, program, *words)
        assert code == (program == "report"), said
        assert not {"lightning", "lightning.pytorch"} & set(heavy), (program, heavy)
