"""Two single experts joined: each answers its times, and the pair is sampled as one network."""

from __future__ import annotations

import pytest
import torch

from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.checkpoints.experts import join_experts
from flowanchor.errors import CheckpointError

BOUNDED = {"overrides": ["objective.shortcut.boundaries=[0.125]"], "objective": "facm", "wan": "one", "validate": False}


@pytest.fixture
def runs(training, tmp_path):
    """Two short runs whose checkpoints say what they were trained with."""
    paths = {}
    for number, name in enumerate(("high", "low")):
        training.fit(tmp_path, name, 1 + number, 8, save=True, **BOUNDED)
        path = tmp_path / f"{name}.ckpt"
        content = torch.load(path, weights_only=True)
        content["flowanchor"]["config"]["objective"]["shortcut"] = {"boundaries": [0.125]}
        torch.save(content, path)
        paths[name] = str(path)
    return paths


def test_each_expert_answers_its_times(runs, tmp_path):
    file, weights, meta, ema = join_experts(runs, "none")
    write_consolidated(tmp_path / "pair.safetensors", weights, meta, ema)
    pair = load_model(tmp_path / "pair.safetensors").backbone
    assert pair.boundary == 0.875 and str(file) == runs["low"]
    x, text = torch.randn(2, 1, 1, 8, 8), torch.randn(2, 4, 12)
    with torch.no_grad():
        for name, t in (("high", 0.1), ("low", 0.5)):
            alone = load_model(runs[name], ema="none").backbone
            assert torch.equal(pair(x, torch.full((2,), t), text), alone(x, torch.full((2,), t), text))


def test_what_does_not_fit(runs):
    with pytest.raises(CheckpointError, match="named high and low, not high, other"):
        join_experts({"high": runs["high"], "other": runs["low"]})
    content = torch.load(runs["high"], weights_only=True)
    content["flowanchor"]["config"]["objective"]["shortcut"] = {"boundaries": []}
    torch.save(content, runs["high"])
    with pytest.raises(CheckpointError, match=r"boundaries=\[\] and \[0.125\]: both need the same"):
        join_experts(runs)
    content["flowanchor"]["config"]["backbone"]["num_layers"] = 2
    torch.save(content, runs["high"])
    with pytest.raises(CheckpointError, match=r"different networks \(num_layers\)"):
        join_experts(runs)
    content["flowanchor"]["config"]["backbone"]["_target_"] = "flowanchor.plugins.backbones.sit.SiT"
    torch.save(content, runs["high"])
    with pytest.raises(CheckpointError, match="holds no Wan"):
        join_experts(runs)
