"""The same with CUDA graphs, where there is a device for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from flowanchor.graphs.cuda import CudaGraphs
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity

from .runs import backbone, fit

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


class NoWaiting(pl.Callback):
    """From the first replay on, whatever lets the host wait for the device in a training step is an error."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "goal", [("objective=facm",), ("objective=alpha_flow", "objective.shortcut.run_steps=8")], ids=str
)
@pytest.mark.parametrize("network", ["lightningdit", "dit", "wan"])
def test_a_graph_trains_what_the_step_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: tuple[str, ...], network: str
) -> None:
    captures = []
    capture = CudaGraphs.capture
    monkeypatch.setattr(CudaGraphs, "capture", lambda self, function: captures.append(1) or capture(self, function))
    runs = [fit(tmp_path, graphs, goal, network, on="gpu", steps=11) for graphs in (False, True)]
    assert len(captures) == (3 if "alpha_flow" in goal[0] else 1)
    for eager, graphed in zip(runs[0]["rows"], runs[1]["rows"], strict=True):
        assert graphed == pytest.approx(eager, rel=1e-3, abs=1e-4)


def test_the_host_waits_for_nothing(tmp_path: Path) -> None:
    frozen = CheckpointVelocity.of_network(backbone(), Guidance(1.75, 0.125, 0.9))
    run = fit(
        tmp_path, True, velocity=frozen, on="gpu", steps=5, callbacks=[NoWaiting()], record=False, log_every_n_steps=100
    )
    assert run["module"].graphed
