"""Nothing heavy is imported before it is needed, and Lightning only where something trains."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
save_checkpoint = _module.save_checkpoint

# What one interpreter has imported after each of several command lines, right and wrong ones. Where it has Lightning
# from the start (tests/warm), that is forgotten: nothing of this project was imported then, so whatever needs it now
# imports it again.
WATCHED = """
import json, runpy, sys
sys.stderr = sys.stdout
for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
    del sys.modules[name]
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    else:
        code = 0
    from hydra.core.global_hydra import GlobalHydra
    GlobalHydra.instance().clear()
    heavy = ("torch", "lightning.pytorch", "lightning", "torchmetrics", "transformers", "matplotlib", "diffusers")
    print("WATCHED", json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def watched(folder, *lines):
    """Of each line: its exit code, what of the heavy libraries is imported by then, and what it said."""
    words = [[str(ROOT / "src" / f"{program}.py"), *rest] for program, *rest in lines]
    command = [sys.executable, "-c", WATCHED, json.dumps(words)]
    line = "python train.py objective="
    shell = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | shell)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^WATCHED (.*)\n", done.stdout, flags=re.MULTILINE)
    found = [(*json.loads(watch), said) for said, watch in zip(parts[::2], parts[1::2], strict=False)]
    assert len(found) == len(lines)
    return found


@pytest.mark.cold  # what a fresh interpreter imports
def test_the_command_line_waits_for_no_library(tmp_path):
    lines = [["--help"], ["objective=facn"], ["trainer.max_stepz=1"], ["-sc", "query=bash"], ["--version"]]
    expected = ["backbone", "did you mean facm", "did you mean trainer.max_steps", "objective=facm", "flowanchor"]
    found = watched(tmp_path, *(["train", *words] for words in lines))
    for words, sentence, (_, heavy, said) in zip(lines, expected, found, strict=True):
        assert not heavy and "Traceback" not in said and sentence in said, (words, heavy, said)


@pytest.mark.cold  # what a fresh interpreter imports
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
    scored = ("num_samples=20", "nfe=1", "metric=random", f"metric.cache_dir={tmp_path}", "name=e")
    lines = (
        ("sample", f"checkpoint={run}", "num_samples=4", "name=s"),
        ("eval", f"checkpoint={run}", *scored),
        ("convert", f"checkpoint={run}", "output=one.safetensors"),
        ("report", f"runs={tmp_path}", "name=r"),  # which finds none
    )
    for (program, *_), (code, heavy, said) in zip(lines, watched(tmp_path, *lines), strict=True):
        assert code == (program == "report"), said
        assert not {"lightning", "lightning.pytorch"} & set(heavy), (program, heavy)
