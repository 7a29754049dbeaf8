"""Trainings whose every loss is known: what moves code, or makes it faster, must not move these.

python tests/integration/test_golden_curves.py      # writes them anew, after a change that is meant to change them
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

GOLDEN = Path(__file__).parents[1] / "golden" / "curves.json"
NAMES = ("train/loss", "train/anchor", "train/shortcut", "train/tangent_norm", "train/grad_norm")
RUN = [
    "objective=facm", "trainer.max_steps=50", "trainer.precision=64-true", "backbone.depth=2",
    "backbone.hidden_size=32",
    "backbone.num_heads=2", "data.batch_size=16", "log_every_n_steps=1", "threads=1", "callbacks=none", "ema=none",
    "trainer.limit_val_batches=0", "name=curve",
]  # fmt: skip
WAN = dict(
    in_channels=4, height=4, width=6, num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32,
    text_dim=8, freq_dim=16, text_len=5,
)  # fmt: skip


def digits(train) -> dict[str, list[float]]:
    """50 steps of FACM from scratch on digits, float64, through the program."""
    train(*RUN)
    rows = list(csv.DictReader(Path("outputs/train/curve/csv/metrics.csv").open()))
    return {name: [float(row[name]) for row in rows] for name in NAMES}


def wan() -> dict[str, list[float]]:
    """20 steps of FACM with a guided teacher on random latents of a small Wan, float64, in plain PyTorch."""
    from flowanchor.interfaces import Batch
    from flowanchor.jumps.guidance import Guidance
    from flowanchor.jvp import Chain
    from flowanchor.plugins.backbones.wan import Wan
    from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
    from flowanchor.text.base import Tokens

    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        objective = instantiate(compose("train", ["objective=facm"]).objective, _convert_="all")
    torch.manual_seed(0)
    teacher, student = Wan(**WAN).double().eval(), Wan(**WAN).double().train()
    for network in (teacher, student):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    teacher.conditioning.use_null(Tokens(torch.randn(5, 8, dtype=torch.float64)))
    velocity = CheckpointVelocity.of_network(teacher, Guidance(2.0))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    losses, norms = [], []
    for step in range(20):
        torch.manual_seed(step)
        x1, text = torch.randn(4, 4, 1, 4, 6, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)
        batch = Batch(x1, Tokens(text))
        noise = torch.randn_like(batch.x1)
        objective.at_step(step)
        result = objective(student, batch, velocity, Chain(), noise, *objective.draw(4, torch.device("cpu")))
        optimizer.zero_grad()
        result.loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)))
        optimizer.step()
        losses.append(float(result.loss.detach()))
    return {"loss": losses, "grad_norm": norms}


def assert_close(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-8), name


def test_facm_on_digits(command):
    assert_close(digits(lambda *words: command("train", *words)), json.loads(GOLDEN.read_text())["digits"])


def test_facm_on_wan():
    assert_close(wan(), json.loads(GOLDEN.read_text())["wan"])


if __name__ == "__main__":
    import os
    import tempfile

    from flowanchor.programs.commands import train

    def run(*words: str) -> None:
        sys.argv = ["src/train.py", *words]
        train()

    os.chdir(tempfile.mkdtemp())
    found = {"digits": digits(run), "wan": wan()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
