"""A tiny run as a training leaves it: a checkpoint with random weights, curves, a sample grid."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import flowanchor

_spec = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).parents[1] / "programs" / "tiny_checkpoint.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

ROWS = "epoch,images_per_second,step,train/loss,val/loss\n0,100.0,9,1.5,\n0,120.0,19,1.25,\n0,,19,,1.75\n"


def write_run(folder: Path, checkpoint: bool = True) -> Path:
    """A run in progress, step 19 of 100."""
    if checkpoint:
        _module.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    settings = {
        "objective": {"_target_": "flowanchor.plugins.objectives.composed.Composed"}, "seed": 0,
        "trainer": {"max_steps": 100},
    }  # fmt: skip
    (folder / "csv").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "csv" / "metrics.csv").write_text(ROWS)
    (folder / "samples").mkdir()
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / "samples" / "step_00000010.png")
    return folder


@pytest.fixture(scope="session")
def shortcut(tmp_path_factory):
    """A few-step model of ten classes of 8x8 pixels."""
    torch.set_num_threads(1)
    return flowanchor.load(_module.save_checkpoint(tmp_path_factory.mktemp("student") / "checkpoints" / "last.ckpt"))


@pytest.fixture(scope="session")
def flow(tmp_path_factory):
    """The same as a flow model."""
    path = tmp_path_factory.mktemp("teacher") / "checkpoints" / "last.ckpt"
    return flowanchor.load(_module.save_checkpoint(path, kind="flow"))


@pytest.fixture
def run(tmp_path):
    """A run in progress."""
    return write_run(tmp_path / "run")


@pytest.fixture
def unborn(tmp_path):
    """A run that has saved no checkpoint yet."""
    return write_run(tmp_path / "unborn", checkpoint=False)
