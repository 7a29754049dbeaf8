"""Adapters in transformers of diffusers, against dense networks with the weights added by hand; the base as teacher."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import flowanchor
from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.base_lora import with_base_lora
from flowanchor.checkpoints.sources import identify, weight_settings
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Question
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, Full, TwoPass, compile_blocks
from flowanchor.plugins.backbones.lora import ADAPTER, adapted_layers, is_adapter
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.teachers.base import BaseVelocity
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.programs.train import build_module
from flowanchor.text.base import Tokens
from flowanchor.weights import copy_weights

from .diffusers_cases import CASES
from .some import one_of_each_kind

LORA = {"rank": 3, "alpha": 6}
WAN = {
    "in_channels": 1, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12, "text_len": 6,
}  # fmt: skip
NAMES = [name for name in CASES if "padded" not in name and name not in ("SD3", "FLUX.1 dev")]
every = pytest.mark.parametrize("name", NAMES)
ENGINES = {"chain": Chain(), "selective": Chain("selective"), "false": Chain(False), "two": TwoPass()}


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def by_hand(state, factor=2.0):
    """A state dict with adapters -> that of a plain network: W + alpha / rank B A."""
    plain = {name: value.clone() for name, value in state.items() if not is_adapter(name)}
    for name in state:
        if name.endswith(f".lora_A.{ADAPTER}.weight"):
            layer = name.removesuffix(f".lora_A.{ADAPTER}.weight")
            plain[f"{layer}.weight"] += factor * state[f"{layer}.lora_B.{ADAPTER}.weight"] @ state[name]
    return plain


def three(name, **more):
    """A student with adapters, its base, and the dense network of its weights; float64."""
    case = CASES[name]
    student, base, dense = (case.network(**more, **options).double() for options in ({"lora": LORA}, {}, {}))
    state = student.state_dict()
    base.load_state_dict({key: value for key, value in state.items() if not is_adapter(key)})
    dense.load_state_dict(by_hand(state))
    return student, base, dense


def gradient(network, out, weight):
    network.zero_grad()
    (out * weight).sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", one_of_each_kind(NAMES))
def test_student_and_base_in_one_set_of_weights(name):
    """Values, tangents and gradients of both, whatever the flags say while a stage runs again."""
    student, base, dense = three(name)
    x, t, cond = CASES[name].inputs()
    weight, asked = torch.randn_like(x), [Question(t, along=(torch.randn_like(x), torch.ones_like(t)))]
    trained = {key for key, p in student.named_parameters() if p.requires_grad}
    assert trained and all(map(is_adapter, trained))
    assert student.borrowed() == set(base.state_dict())

    with torch.no_grad():
        plain = base.predict(x, t, cond)
        with student.without_adapters():
            assert relative(student.predict(x, t, cond), plain) < 1e-14  # products of other addresses round elsewhere
        assert relative(student.predict(x, t, cond), dense.predict(x, t, cond)) < 1e-12
    assert relative(dense.predict(x, t, cond), plain) > 1e-2, "adapters say something"
    wanted = Full()(dense, x, cond, asked)[0]
    whole = gradient(dense, wanted.prediction, weight)
    projected = {}
    for key, layer in adapted_layers(student).items():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        projected[f"{key}.lora_B.{ADAPTER}.weight"] = 2 * whole[f"{key}.weight"] @ a.T
        projected[f"{key}.lora_A.{ADAPTER}.weight"] = 2 * b.T @ whole[f"{key}.weight"]
    assert set(projected) == trained
    total = torch.cat([projected[key].flatten() for key in sorted(trained)])

    for key in ENGINES if name in ("SD3.5", "FLUX.1") else ("chain", "selective"):
        engine = ENGINES[key]
        out = engine(student, x, cond, asked)[0]
        with student.without_adapters():  # the teacher, by an engine too, and the student's backward inside
            taught = engine(student, x, cond, asked)[0]
            found = gradient(student, out.prediction, weight)
        assert relative(taught.prediction, plain) < 1e-12, key
        assert relative(out.prediction, wanted.prediction) < 1e-11 and relative(out.tangent, wanted.tangent) < 1e-11
        assert set(found) == trained, f"{key}: a backward in a region without adapters lost gradients"
        assert relative(torch.cat([found[one].flatten() for one in sorted(trained)]), total) < 1e-10, key


def test_the_trap_that_is_avoided(monkeypatch):
    """Stages that go by the flags of the moment lose the gradient without an error."""
    from flowanchor.plugins.backbones.diffusers import walking

    student, *_ = three("SD3.5")
    x, t, cond = CASES["SD3.5"].inputs()
    asked = [Question(t, along=(torch.randn_like(x), torch.ones_like(t)))]
    monkeypatch.setattr(walking, "switch", lambda *_: None)
    out = Chain()(student, x, cond, asked)[0]
    for layer in adapted_layers(student).values():
        layer._disable_adapters = True
    assert not gradient(student, out.prediction, torch.randn_like(x))


@pytest.mark.parametrize("name", ["SD3.5", "FLUX.1"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_base_teaches_as_a_checkpoint_of_it_would(name, scale):
    student, base, _ = three(name)
    x, t, cond = CASES[name].inputs()
    flow = torch.randn_like(x)
    teacher = CheckpointVelocity.of_network(base, Guidance(scale, 0.125, 1.0))
    wanted = teacher(x, t, cond, flow, student, ExpandedInterval())
    found = BaseVelocity(scale)(x, t, cond, flow, student.train(), ExpandedInterval())
    assert relative(found, wanted) < 1e-14 and not found.requires_grad and student.adapters_on


def test_the_base_of_wan_knows_no_end():
    """Whatever its embedder of the end has become: that one is trained beside the adapters."""
    for way in ("auxiliary", "gated", "decoupled"):
        torch.manual_seed(0)
        student, base = Wan(**WAN, lora=LORA, end_time=way), Wan(**WAN)
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        own = base.state_dict()
        base.load_state_dict({key: value for key, value in student.state_dict().items() if key in own})
        x, t = torch.randn(2, 1, 1, 8, 8), torch.tensor([0.2, 0.7])
        cond = Tokens(torch.randn(2, 4, 12))
        found = BaseVelocity(2.0)(x, t, cond, x, student.eval(), ExpandedInterval())
        wanted = CheckpointVelocity.of_network(base, Guidance(2.0, 0.125, 1.0))(x, t, cond, x, student, None)
        assert relative(found, wanted) < 1e-6, way
        with torch.no_grad():
            assert relative(student.predict(x, t, cond, torch.ones(2)), base.predict(x, t, cond)) > 1e-2


def test_compiled_stages_follow_the_switch():
    student, base = (network.float() for network in three("LTX-Video")[:2])  # blocks of one kind
    x, t, cond = CASES["LTX-Video"].inputs(torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        on, off = student.predict(x, t, cond), base.predict(x, t, cond)
        compile_blocks(student, backend="eager", fullgraph=True)
        for _ in range(2):
            assert relative(student.predict(x, t, cond), on) < 1e-5
            with student.without_adapters():
                assert relative(student.predict(x, t, cond), off) < 1e-5
    assert relative(on, off) > 1e-2
    torch._dynamo.reset()


# Blocks of two streams: 8 layers of attention and 4 of feed-forward; the last of SD3 gives no text back.
COUNTS = {"SD3.5": (8 + 4 + 4) + (7 + 2), "FLUX.1": 12 + 2 * 5, "FLUX.2": 12 + 2 * 2, "Qwen-Image": 2 * 12,
          "Z-Image": 2 * 7, "Sana": 2 * 8, "PixArt": 2 * 10, "LTX-Video": 2 * 10, "HunyuanVideo 1.5": 2 * 12,
          "Krea 2": 2 * 8}  # fmt: skip


@every
def test_the_usual_layers_lie_within_the_blocks(name):
    network = CASES[name].network(lora=LORA)
    inside = {id(layer) for link in network.blocks for layer in link.block.modules()}
    layers = adapted_layers(network)
    assert len(layers) == COUNTS[name], sorted(layers)
    assert all(id(layer) in inside for layer in layers.values())
    assert not network.embed_adapters and not network.head_adapters
    assert sum(len(link.adapters) for link in network.blocks) == len(layers)


def test_layers_are_chosen_by_the_ends_of_their_names():
    case = CASES["FLUX.1"]
    found = adapted_layers(case.network(lora={"rank": 2, "targets": ["attn.to_q", "x_embedder"]}))
    assert sorted(found) == [
        "single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_q",
        "transformer_blocks.0.attn.to_q", "x_embedder",
    ]  # fmt: skip
    head = case.network(lora={"rank": 2, "targets": ["norm_out.linear"]})
    assert len(head.head_adapters) == 1
    with pytest.raises(ConfigError, match=r"names no layer of this network by nothing: its blocks have .*attn.to_q"):
        case.network(lora={"rank": 2, "targets": ["to_q", "nothing"]})
    with pytest.raises(ConfigError, match="rank=0 is no rank"):
        case.network(lora={"rank": 0})


def test_who_has_no_adapters_has_no_base():
    with pytest.raises(ConfigError, match="add backbone.lora.rank=16, or choose teacher=checkpoint"):
        BaseVelocity().check(CASES["SD3"].network())
    with pytest.raises(ConfigError, match="teacher.ask=auto is unknown"):
        BaseVelocity(ask="auto")


@pytest.mark.parametrize("name", ["SD3.5", "Sana"])
def test_fresh_adapters_change_nothing_and_merged_ones_are_no_more(name):
    case = CASES[name]
    torch.manual_seed(3)
    fresh = type(case.network())(case.description.stock, case.settings, **case.sizes(), **case.more, lora=LORA)
    layers = adapted_layers(fresh).values()
    assert all(layer.lora_A[ADAPTER].weight.any() and not layer.lora_B[ADAPTER].weight.any() for layer in layers)
    student, _, dense = three(name)
    student.merge()
    assert set(student.state_dict()) == set(dense.state_dict()) and not student.borrowed()
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(student.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    x, t, cond = case.inputs()
    assert relative(student.predict(x, t, cond), dense.predict(x, t, cond)) < 1e-12


# ------------------------------------------------------------------------------------------- a LoRA of the user's own


def own_lora(network, folder, way):
    """Random factors beside two layers in the way of other programs, alpha twice the rank -> the file, what it adds."""
    ends = "0.attn1.to_q" if way in ("wan", "ltx") else ("0.attn.to_q", "0.attn.to_out.0")
    layers = sorted(name for name, _ in network.named_modules() if name.endswith(ends))
    tensors, added, metadata = {}, {}, {}
    for layer in layers:
        weight = network.get_submodule(layer).weight
        a, b = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
        added[f"{layer}.weight"] = 2 * b @ a
        name = f"transformer.{layer}"
        if way == "ltx":
            name = f"diffusion_model.{layer}"
        if way == "wan":
            name = f"diffusion_model.{layer.replace('attn1.to_q', 'self_attn.q')}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, 2 * b if way == "in_b" else b
        if way in ("alpha", "wan", "ltx"):
            tensors[f"{name}.alpha"] = torch.tensor(6.0)
    if way == "peft":
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 6})}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "own.safetensors", metadata)
    assert added
    return folder / "own.safetensors", added


WAYS = [("SD3.5", "peft"), ("FLUX.1", "alpha"), ("SD3", "in_b"), ("Wan", "wan"), ("LTX-Video", "ltx")]


@pytest.mark.parametrize("name, way", WAYS)
def test_a_lora_of_the_users_own_is_merged_with_its_scale(name, way, tmp_path):
    network = Wan(**WAN) if name == "Wan" else CASES[name].network()
    file, added = own_lora(network, tmp_path, way)
    other = CASES["Sana"].network()
    with pytest.raises(ConfigError, match="which this network does not have|not read by"):
        with_base_lora(other, other.state_dict(), {"base_lora": str(file)})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = with_base_lora(network, before, {"base_lora": str(file), "base_lora_scale": 0.5})
    assert set(weights) == set(before)
    copy_weights(weights, network.state_dict())
    for key, value in network.state_dict().items():
        wanted = before[key] + 0.5 * added[key] if key in added else before[key]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weights[key], wanted, rtol=1e-6, atol=1e-6)


def test_adapters_are_opened_over_the_base_that_they_were_trained_on(tmp_path):
    """`base_lora` is a part of it: found again, and known by what it holds."""
    base = CASES["SD3.5"].network()
    base.network.save_pretrained(tmp_path / "base")
    file, added = own_lora(base, tmp_path, "peft")
    cfg = flowanchor.compose(
        "backbone=diffusers", f"initialise_from={tmp_path / 'base'}", f"base_lora={file}", "backbone.lora.rank=2",
        "teacher=base", "data.channels=4", "data.size=8", "backbone.text_len=5",
    )  # fmt: skip
    student = build_module(cfg).student
    for key, value in base.state_dict().items():
        torch.testing.assert_close(student.state_dict()[key], value + added.get(key, 0), rtol=1e-6, atol=1e-6)
    config = OmegaConf.to_container(cfg, resolve=True)
    meta = {"format": 1, "kind": "shortcut", "step": 1, "config": config, "sources": identify(weight_settings(config))}
    assert set(meta["sources"]) == {"initialise_from", "base_lora"}
    adapters = {f"student.{key}": value for key, value in student.state_dict().items() if is_adapter(key)}
    torch.save({"flowanchor": meta, "state_dict": adapters}, tmp_path / "run.ckpt")
    opened = load_model(tmp_path / "run.ckpt", ema="none")
    assert set(opened.sources) == {"initialise_from", "base_lora"}
    for key, value in student.state_dict().items():
        assert torch.equal(opened.backbone.state_dict()[key], value), key
    file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="the LoRA under them is not where .* with base_lora=PATH"):
        load_model(tmp_path / "run.ckpt")
    opened = load_model(tmp_path / "run.ckpt", ema="none", base_lora=tmp_path / "moved.safetensors")
    for key, value in student.state_dict().items():
        assert torch.equal(opened.backbone.state_dict()[key], value), key
    own_lora(base, tmp_path, "in_b")
    with pytest.raises(CheckpointError, match="the LoRA under them has changed"):
        load_model(tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda tensors, b: tensors.pop(b), "no whole product beside"),
        (lambda tensors, b: tensors.update({b: tensors[b][:, :2].contiguous()}), "no whole product beside"),
        (lambda tensors, b: tensors.update({b: tensors[b][:-1].contiguous()}), "another size beside"),
        (lambda tensors, b: tensors.update({"transformer.x.alpha": torch.tensor(2.0)}), "more than products of two"),
        (lambda tensors, b: tensors.update({"lora_unet_x.weight": tensors[b].clone()}), "knows no|not read by"),
    ],
    ids=["no B", "ranks", "size", "alpha of nothing", "foreign name"],
)
def test_a_spoilt_lora_is_told(spoil, told, tmp_path):
    network = CASES["SD3.5"].network()
    file, _ = own_lora(network, tmp_path, "alpha")
    tensors = load_file(file)
    spoil(tensors, next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=told):
        with_base_lora(network, network.state_dict(), {"base_lora": str(file)})


def test_a_teacher_that_reads_longer_texts_is_told():
    network = CASES["FLUX.1"].network
    teacher = CheckpointVelocity.of_network(network(text_len=12), Guidance(1.0))
    with pytest.warns(UserWarning, match="reads 12 tokens of a text and this student 5 tokens"):
        teacher.check(network())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CheckpointVelocity.of_network(network(), Guidance(1.0)).check(network())
