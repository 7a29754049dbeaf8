"""Two single experts joined: each answers its times, and the pair is sampled as one network."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.errors import CheckpointError
from flowanchor.plugins.formats.wan_pair import join_experts
from flowanchor.programs.convert import main as convert
from flowanchor.text.base import Tokens

BOUNDED = {"overrides": ["objective.shortcut.boundaries=[0.125]"], "objective": "facm", "wan": "one", "validate": False}


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory):
    """Two short runs whose checkpoints say what they were trained with."""
    folder = tmp_path_factory.mktemp("trained")
    for number, name in enumerate(("high", "low")):
        training.fit(folder, name, 1 + number, 8, save=True, **BOUNDED)
        path = folder / f"{name}.ckpt"
        content = torch.load(path, weights_only=True)
        content["flowanchor"]["config"]["objective"]["shortcut"] = {"boundaries": [0.125]}
        torch.save(content, path)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """Copies of their checkpoints."""
    return {name: str(shutil.copy(trained / f"{name}.ckpt", tmp_path)) for name in ("high", "low")}


def test_each_expert_answers_its_times(runs, tmp_path):
    joined = join_experts(runs, "none")
    write_consolidated(tmp_path / "pair.safetensors", joined.weights, joined.meta, joined.ema)
    pair = load_model(tmp_path / "pair.safetensors").backbone
    assert pair.boundary == 0.875 and str(joined.file) == runs["low"]
    x, text = torch.randn(2, 1, 1, 8, 8), Tokens(torch.randn(2, 4, 12))
    with torch.no_grad():
        for name, t in (("high", 0.1), ("low", 0.5)):
            alone = load_model(runs[name], ema="none").backbone
            assert torch.equal(pair(x, torch.full((2,), t), text), alone(x, torch.full((2,), t), text))


def test_other_names_than_those_of_the_experts(runs, tmp_path, monkeypatch, capsys):
    words = [f"checkpoint={{high: {runs['high']}, other: {runs['low']}}}", f"output={tmp_path}/a.safetensors"]
    monkeypatch.setattr(sys, "argv", ["src/convert.py", *words])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        convert()
    assert "named high and low, not high, other" in capsys.readouterr().err


def test_what_does_not_fit(runs):
    content = torch.load(runs["high"], weights_only=True)
    content["flowanchor"]["config"]["objective"]["shortcut"] = {"boundaries": []}
    torch.save(content, runs["high"])
    with pytest.raises(CheckpointError, match=r"boundaries=\[\] and \[0.125\]: both need the same"):
        join_experts(runs)
    content["flowanchor"]["config"]["backbone"]["num_layers"] = 3
    torch.save(content, runs["high"])
    with pytest.raises(CheckpointError, match=r"different networks \(num_layers\)"):
        join_experts(runs)
    content["flowanchor"]["config"]["backbone"]["_target_"] = "flowanchor.plugins.backbones.sit.SiT"
    torch.save(content, runs["high"])
    with pytest.raises(CheckpointError, match="holds no Wan"):
        join_experts(runs)
