"""A whole training step: it never waits for the device, and replayed as a graph it is the same step."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from flowanchor.jvp import Chain

from .device import CUDA, autocast, batch_of, facm, needs_it, network, taught_by

pytestmark = needs_it


def test_a_step_asks_for_no_value():
    """PyTorch raises where the host would wait for the device."""
    student, teacher = network(), network(1)
    batch, noise, t = batch_of(4, student)
    objective, velocity, engine = facm(), taught_by(teacher), Chain()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def step() -> torch.Tensor:
        with autocast():
            loss = objective(student, batch, velocity, engine, noise, t).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for _ in range(2):  # what is looked at once, compiled or allocated
        step()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.skipif(find_spec("hydra") is None, reason="train.py needs Hydra")
def test_a_captured_run_is_the_run_without_a_graph(tmp_path, monkeypatch):
    """By train.py: the weights after eight steps, bit for bit."""
    from hydra.core.global_hydra import GlobalHydra

    from flowanchor.checkpoints import read_checkpoint
    from flowanchor.programs.train import main

    conf = Path(__file__).parents[2] / "conf" / "train.yaml"
    if "\ncuda_graph:" not in conf.read_text():
        pytest.skip("conf/train.yaml has no cuda_graph")
    found = []
    for graph in ("false", "true" if CUDA else "false"):
        folder = tmp_path / f"{graph}{len(found)}"
        settings = ["trainer.max_steps=8", "trainer.limit_val_batches=0", "~callbacks.sample_grid", "~callbacks.best"]
        settings += ["trainer.precision=bf16-mixed", f"hydra.run.dir={folder}", "debug=true", "data.batch_size=16"]
        settings += ["backbone.depth=2", "ema=none", "callbacks.last.every_n_train_steps=8", f"cuda_graph={graph}"]
        settings += [] if CUDA else ["trainer.accelerator=cpu"]
        monkeypatch.setattr(sys, "argv", ["train.py", *settings])
        GlobalHydra.instance().clear()
        main()
        found.append(read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"])
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name
