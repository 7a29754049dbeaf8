"""Two processes (gloo, DDP) against one process with the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

SPY = '''
"""A callback that writes down each rank's gradients and parameters after every step."""
import os
import lightning.pytorch as pl
import torch

class Dump(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = {n: p.grad.clone() for n, p in module.student.named_parameters() if p.grad is not None}
        torch.save(gradients, f"{os.environ['DUMP']}/gradients_{trainer.global_step}_{trainer.global_rank}.pt")

    def on_train_end(self, trainer, module):
        torch.save(dict(module.student.state_dict()), f"{os.environ['DUMP']}/parameters_{trainer.global_rank}.pt")
'''


def train(folder: Path, name: str, *overrides: str) -> Path:
    dump = folder / name
    dump.mkdir()
    (folder / "spy.py").write_text(SPY)
    command = [
        sys.executable, str(ROOT / "src" / "train.py"),
        "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2",
        "callbacks=none", "+callbacks.dump._target_=spy.Dump", "logger=none", "ema=none",
        "optimizer.lr=1e-3", f"name={name}", "backbone.disable_label_dropout=true",
        "trainer.accelerator=cpu", "trainer.max_steps=3", "trainer.limit_val_batches=0",
        *overrides,
    ]  # fmt: skip
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "DUMP": str(dump),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return dump


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    one = train(tmp_path, "one", "data.batch_size=32")
    two = train(tmp_path, "two", "data.batch_size=16", "strategy=ddp", "trainer.devices=2")
    for step in range(3):
        first, second = load(two / f"gradients_{step}_0.pt"), load(two / f"gradients_{step}_1.pt")
        joint = load(one / f"gradients_{step}_0.pt")
        assert first.keys() == second.keys() == joint.keys() and joint
        for name in joint:
            assert torch.equal(first[name], second[name]), f"{name}: ranks keep different gradients"
            assert (first[name] - joint[name]).norm() <= 1e-4 * joint[name].norm() + 1e-7, (step, name)
    first, second, joint = load(two / "parameters_0.pt"), load(two / "parameters_1.pt"), load(one / "parameters_0.pt")
    for name in joint:
        assert torch.equal(first[name], second[name]), name
        # Adam divides by the gradient's own size, so that tiny gradients may move a weight by up to a learning rate.
        assert (first[name] - joint[name]).abs().max() <= 5e-4, name
