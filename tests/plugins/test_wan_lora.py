"""Adapters against the dense network they stand for: prediction, tangent, gradients; saved alone, resumed, exported."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.checkpoints.digest import file_digest
from flowanchor.checkpoints.sources import identify, weight_settings
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Question
from flowanchor.jvp import Chain, Full, TwoPass
from flowanchor.plugins.backbones.lora import ADAPTER, is_adapter, merged
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.programs.convert import main as convert
from flowanchor.text.base import Tokens

SMALL = {
    "in_channels": 1, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12, "text_len": 6,
}  # fmt: skip

START = {
    "kind": "flow", "step": 0,
    "config": {
        "backbone": {"_target_": "flowanchor.plugins.backbones.wan.Wan", **SMALL},
        "objective": {"interval": {"_target_": "flowanchor.plugins.objectives.intervals.plain.PlainInterval"}},
    },
}  # fmt: skip


@pytest.fixture
def adapted():
    """Float64, its adapters no longer zero."""
    torch.manual_seed(0)
    network = Wan(**SMALL, lora={"rank": 3, "alpha": 6})
    with torch.no_grad():
        torch.nn.init.normal_(network.proj_out.weight, std=0.2)
        for name, parameter in network.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.3)
    return network.double().eval()


@pytest.fixture
def dense(adapted):
    network = Wan(**SMALL).double().eval()
    network.load_state_dict(merged(adapted))
    return network


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    x = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    return (
        x,
        torch.tensor([0.2, 0.7]).double(),
        Tokens(torch.randn(2, 4, 12).double()),
        torch.randn_like(x),
        torch.ones(2).double(),
    )


def test_only_adapters_are_trained_and_the_rest_keeps_its_names(adapted):
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(map(is_adapter, trained))
    names = set(adapted.state_dict())
    assert set(Wan(**SMALL).state_dict()) == adapted.borrowed() == {name for name in names if not is_adapter(name)}
    again = Wan(**SMALL, lora={"rank": 3, "alpha": 6}).double()
    again.load_state_dict(adapted.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), adapted.state_dict().values(), strict=True)
    )


def test_a_fresh_adapter_changes_nothing(inputs):
    torch.manual_seed(4)
    network = Wan(**SMALL, lora={"rank": 2}).double()
    torch.nn.init.normal_(network.proj_out.weight)
    plain = Wan(**SMALL).double()
    plain.load_state_dict({name: v for name, v in network.state_dict().items() if not is_adapter(name)})
    assert torch.equal(network(*inputs[:3]), plain(*inputs[:3]))
    assert all(layer.lora_A[ADAPTER].weight.any() for layer in network.modules() if hasattr(layer, "lora_A"))


@pytest.mark.parametrize("engine", [Full(), Chain(), Chain("selective"), Chain(False), TwoPass()], ids=repr)
def test_prediction_tangent_and_projected_gradient(adapted, dense, inputs, engine):
    """With W = W0 + s B A and G the dense gradient of W: the adapters' are s G A^T and s B^T G."""
    x, t, text, dx, dt = inputs
    for network in (adapted, dense):
        network.zero_grad()
    along = [Question(t, along=(dx, dt))]
    (ours,), (theirs,) = engine(adapted, x, text, along), Full()(dense, x, text, along)
    for dual in (ours, theirs):
        dual.prediction.square().sum().backward()
    assert (ours.prediction - theirs.prediction).norm() <= 1e-10 * theirs.prediction.norm()
    assert (ours.tangent - theirs.tangent).norm() <= 1e-10 * theirs.tangent.norm()
    seen = 0
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        gradient = dense.get_submodule(name).weight.grad
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        for found, wanted in ((b.grad, 2 * gradient @ a.T), (a.grad, 2 * b.T @ gradient)):
            assert (found - wanted).norm() <= 1e-9 * wanted.norm() + 1e-12, name
            seen += 1
        assert layer.base_layer.weight.grad is None
    assert seen == 2 * 10 * SMALL["num_layers"]


def test_the_stock_network_has_the_adapters_merged(adapted, inputs):
    x, t, text, *_ = inputs
    stock = adapted.float().transformer()
    with torch.no_grad():
        theirs = -stock(
            x.float(), 1000 * (1 - t.float()), torch.nn.functional.pad(text.tokens, (0, 0, 0, 2)).float()
        ).sample
        torch.testing.assert_close(
            adapted(x.float(), t.float(), Tokens(text.tokens.float())), theirs, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "settings, message", [({"rank": 0}, "is no rank"), ({"rank": 2, "targets": ["nothing"]}, "no layer")]
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Wan(**SMALL, lora=settings)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(2)
    network = Wan(**SMALL)
    torch.nn.init.normal_(network.proj_out.weight, std=0.2)
    network.transformer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("teacher", [None, "base"])
def test_a_run_saves_adapters_alone_and_goes_on(training, base, tmp_path, teacher):
    """Four steps without interruption; two, saved, and two more; opened again with the base where it lies."""
    lora = {"wan": "one", "lora": {"rank": 3}, "start": str(base), "objective": "facm", "validate": False, "lr": 0.02}
    lora["teacher"] = teacher
    whole = training.fit(tmp_path, "whole", 4, 8, **lora)
    training.fit(tmp_path, "half", 2, 8, save=True, **lora)
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    names = [name for name in content["state_dict"] if name.startswith("student.")]
    assert names and all(map(is_adapter, names)) and all(map(is_adapter, content["ema"]["power_0.2"]))
    rest = training.fit(tmp_path, "rest", 4, 8, resume=str(tmp_path / "half.ckpt"), **lora)
    for name, value in whole["weights"].items():
        assert torch.equal(rest["weights"][name], value), name
    model = load_model(tmp_path / "half.ckpt", ema="none")
    start = load_model(base).backbone
    x, t, text = torch.randn(2, 1, 1, 8, 8), torch.rand(2), Tokens(torch.randn(2, 4, 12))
    with torch.no_grad():
        assert (model.backbone(x, t, text) - start(x, t, text)).abs().max() > 1e-5, "it was trained"
        for name, p in start.state_dict().items():
            assert torch.equal(model.backbone.state_dict()[name], p), name
    base.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="holds adapters alone.*initialise_from=PATH"):
        load_model(tmp_path / "half.ckpt")
    moved = load_model(tmp_path / "half.ckpt", ema="none", initialise_from=tmp_path / "gone").backbone.state_dict()
    assert all(torch.equal(moved[name], p) for name, p in model.backbone.state_dict().items())


@pytest.fixture
def adapters(training, base, tmp_path):
    """A checkpoint of adapters that knows what its base holds; the base is a checkpoint file."""
    write_consolidated(tmp_path / "base.safetensors", load_model(base).backbone.state_dict(), START, "none")
    start = str(tmp_path / "base.safetensors")
    training.fit(tmp_path, "run", 2, 8, save=True, wan="one", lora={"rank": 3}, start=start, validate=False)
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    content["flowanchor"]["sources"] = identify(weight_settings(content["flowanchor"]["config"]))
    torch.save(content, tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def test_another_base_is_refused(adapters, tmp_path):
    own, other = tmp_path / "base.safetensors", tmp_path / "other.safetensors"
    known = load_model(adapters)
    assert known.sources == {"initialise_from": file_digest(own)}
    weights = load_model(own).backbone.state_dict()
    own.rename(tmp_path / "moved.safetensors")
    write_consolidated(own, {name: p + 1 for name, p in weights.items()}, START, "none")
    shutil.copy(own, other)
    for elsewhere in (None, other):
        with pytest.raises(CheckpointError, match=f"have changed .sha256 {known.sources['initialise_from'][:12]}"):
            load_model(adapters, initialise_from=elsewhere)
    moved = load_model(adapters, initialise_from=tmp_path / "moved.safetensors")
    assert moved.sources == known.sources


@pytest.mark.parametrize("words", [["output=hub", "format=huggingface"], ["consolidate", "output=one.safetensors"]])
def test_what_is_published_needs_no_base(adapters, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["src/convert.py", *words, f"checkpoint={adapters}"])
    before = load_model(adapters).backbone
    convert()
    (tmp_path / "base.safetensors").rename(tmp_path / "gone.safetensors")
    found = load_model(words[-1].removeprefix("output=") if "one" in words[-1] else "hub")
    assert not found.sources
    x, t, text = torch.randn(2, 1, 1, 8, 8), torch.rand(2), Tokens(torch.randn(2, 4, 12))
    with torch.no_grad():
        assert torch.equal(found.backbone(x, t, text), before(x, t, text))
