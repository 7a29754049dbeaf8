"""Networks are laid out without values before they are made, whatever their constructors do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from flowanchor.base import trusted
from flowanchor.checkpoints import load_model, outline
from flowanchor.checkpoints.outline import outline as outlined
from flowanchor.errors import CheckpointError
from flowanchor.interfaces import Backbone, StageContext

INTERVAL = {"_target_": "flowanchor.plugins.objectives.intervals.plain.PlainInterval"}


class Net(Backbone):
    """A plugin's network, whose constructor looks at what it makes."""

    def __init__(self, width: int = 4, depth: int = 2, looks: str = "nowhere", samples: int = 3) -> None:
        super().__init__()
        self.sample_shape = (1, samples)
        rates = torch.linspace(0, 0.1, depth)
        self.rates = [rate.item() for rate in rates] if looks == "at a table" else []
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("table", torch.zeros(width, width), persistent=False)
        self.first = float(self.blocks[0].weight[0, 0]) if looks == "at a value" else 0.0
        self.inner = [nn.Identity() for _ in range(2)]

    def embed(self, x: Any, t: Any, cond: Any, r: Any = None) -> Any:
        return x, StageContext(())

    def head(self, tokens: Any, context: Any) -> Any:
        return tokens


class Adapted(Net):
    """A large frozen matrix of another checkpoint, and a small one that is trained."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width, 1)
        self.adapter = nn.Parameter(torch.zeros(2))

    def borrowed(self) -> set[str]:
        return {name for name in self.state_dict() if name != "adapter"}


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module as a package that has registered its networks."""
    module = ModuleType("a_plugin")
    module.Net, module.Adapted = Net, Adapted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_plugin", module)
    monkeypatch.setattr(trusted, "_located", trusted._located.__wrapped__)
    own = trusted.registered
    monkeypatch.setattr(
        trusted,
        "registered",
        lambda place: own(place) | ({"a_plugin.Net", "a_plugin.Adapted"} if place == "backbone" else set()),
    )


def write(path: Path, weights: dict[str, torch.Tensor], backbone: dict[str, Any], **config: Any) -> Path:
    config = {"backbone": backbone, "objective": {"interval": INTERVAL}, **config}
    meta = {"format": 1, "kind": "flow", "step": 1, "config": config}
    torch.save({"state_dict": {f"student.{k}": v for k, v in weights.items()}, "flowanchor": meta}, path)
    return path


@pytest.mark.parametrize("looks", ["nowhere", "at a table", "at a value"])
def test_constructors_that_look_at_what_they_make(tmp_path, looks):
    weights = Net().state_dict()
    path = write(tmp_path / "a.ckpt", weights, {"_target_": "a_plugin.Net", "looks": looks})
    assert torch.equal(load_model(path).backbone.blocks[1].weight, weights["blocks.1.weight"])
    with pytest.raises(CheckpointError, match="it lacks blocks.2"):
        load_model(write(tmp_path / "b.ckpt", weights, {"_target_": "a_plugin.Net", "looks": looks, "depth": 3}))


@pytest.mark.parametrize("looks", ["nowhere", "at a value"])
@pytest.mark.parametrize("huge", [{"depth": 10**9}, {"width": 10**6}, {"samples": 10**9}, {"samples": 0}])
def test_none_of_them_is_made_too_large(tmp_path, looks, huge):
    path = write(tmp_path / "a.ckpt", Net().state_dict(), {"_target_": "a_plugin.Net", "looks": looks, **huge})
    with pytest.raises(CheckpointError, match="far larger than the weights|samples of|cannot be built"):
        load_model(path)


def test_random_numbers_stay_as_they_were():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    outlined({"_target_": "a_plugin.Net"}, "a.ckpt", Net().state_dict())
    torch.manual_seed(3)
    network = outlined({"_target_": "a_plugin.Net", "looks": "at a value"}, "a.ckpt", {})
    assert torch.equal(torch.get_rng_state(), before) and network.blocks[0].weight.shape == (4, 4)


def test_what_adapters_stand_beside_counts_as_theirs(tmp_path, monkeypatch):
    """A run of adapters is a small file of a large network: the base that it names is looked at, too."""
    monkeypatch.setattr(outline, "SLACK_NUMBERS", 100)
    base = Net(64, 1).state_dict()
    write(tmp_path / "base.ckpt", base, {"_target_": "a_plugin.Net", "width": 64, "depth": 1})
    settings = {"_target_": "a_plugin.Adapted", "width": 64}
    own = {"adapter": torch.ones(2)}
    path = write(tmp_path / "a.ckpt", own, settings, initialise_from=str(tmp_path / "base.ckpt"))
    assert torch.equal(load_model(path).backbone.blocks[0].weight, base["blocks.0.weight"])
    with pytest.raises(CheckpointError, match="far larger than the weights"):
        load_model(write(tmp_path / "b.ckpt", own, settings))
