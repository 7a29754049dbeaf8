"""Settings that change what weights mean and not their shapes: every one is found, named and compared."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from flowanchor.checkpoints import initialise_student
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.imf_dit import IMFDiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.text.base import Tokens

SMALL = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 2, "num_heads": 2,
         "mlp_ratio": 2.0, "num_classes": 3}  # fmt: skip
WAN = {"in_channels": 2, "frames": 1, "height": 4, "width": 4, "num_attention_heads": 2, "attention_head_dim": 12,
       "ffn_dim": 24, "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_len": 3}  # fmt: skip
OTHER = {  # of every argument, a value that is not its usual one here
    "input_size": 8, "patch_size": 1, "in_channels": 4, "hidden_size": 32, "depth": 3, "head_depth": 2, "num_heads": 1,
    "mlp_ratio": 3.0, "num_classes": 4, "class_dropout_prob": 0.2, "use_qknorm": True, "use_swiglu": True,
    "use_rope": True, "use_rmsnorm": True, "wo_shift": True, "learn_sigma": True, "auxiliary_time_cond": True,
    "disable_label_dropout": True, "pixel_norm": True, "end_time": "decoupled", "predicts": "x", "guidance_cond": True,
    "time_scale": 100.0, "velocity_head": False, "frames": 2, "height": 6, "width": 6, "ffn_dim": 48, "num_layers": 3,
    "freq_dim": 16, "text_dim": 8, "text_len": 4, "cross_attn_norm": False, "qk_norm": "rms_norm", "eps": 1e-2,
    "rope_max_seq_len": 512, "condition_dropout": 0.1, "tangent_smoothing": 0.01, "lora": {"rank": 1},
    "attention_head_dim": 8,
}  # fmt: skip
# Tried together, since neither is possible alone: as many channels in other heads.
TOGETHER = {"num_attention_heads": {"num_attention_heads": 1, "attention_head_dim": 24}}
# How `r` is told: tests/plugins/test_end_time.py, and below.
TOLD = {"end_time_split", "end_time_gate"}
# How much of a text is read: a choice of the run, of which a teacher that reads more is spoken of (teacher=checkpoint).
CHOSEN = {"text_len"}
BASES = {
    LightningDiT: SMALL, SiT: {**SMALL, "learn_sigma": False}, DiT: {**SMALL, "learn_sigma": False},
    IMFDiT: {**SMALL, "head_depth": 1}, Wan: WAN,
}  # fmt: skip


def filled(kind, **settings):
    torch.manual_seed(0)
    network = kind(**settings).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return network


def answer(network):
    """To the same samples, times and condition."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, *network.sample_shape, generator=draw)
    t = torch.tensor([0.3, 0.6])
    cond = Tokens(torch.randn(2, 3, 6, generator=draw)) if isinstance(network, Wan) else torch.arange(2)
    with torch.no_grad():
        return network.predict(x, t, cond, t if network.takes_end_time else None)


@pytest.mark.parametrize("kind", BASES, ids=lambda kind: kind.__name__)
def test_no_setting_changes_what_weights_mean_unseen(kind):
    """Each argument is tried: where other weights fit and answer otherwise, the network must say so."""
    base, silent = BASES[kind], set()
    network = filled(kind, **base)
    for name in set(inspect.signature(kind).parameters) - TOLD - CHOSEN:
        change = TOGETHER.get(name) or {name: OTHER[name]}
        if kind is Wan and name == "patch_size":
            change = {name: (1, 1, 4)}
        try:
            other = kind(**{**base, **change}).eval()
        except ConfigError:
            continue  # not of this network, such as data predictions of DiT
        shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (network, other)]
        if shapes[0] != shapes[1] or other.sample_shape != network.sample_shape:
            continue
        other.load_state_dict(network.state_dict())
        if not torch.equal(answer(other), answer(network)):
            silent.add(name)
            assert other.meaning() != network.meaning(), f"{kind.__name__}'s {name} changes what its weights mean"
        else:
            assert other.meaning() == network.meaning(), f"{name} changes nothing, and would be refused"
    expected = {LightningDiT: {"num_heads", "pixel_norm", "time_scale", "predicts"}, DiT: {"num_heads"}}
    assert silent == expected.get(kind, silent) and silent


def saved(network, path, **settings):
    """A checkpoint of a run with this network."""
    config = {
        "backbone": {"_target_": f"{type(network).__module__}.{type(network).__name__}", **settings},
        "objective": {"interval": {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}},
    }
    meta = {"format": 1, "config": config, "kind": "flow", "step": 1, "class_names": []}
    torch.save(
        {"state_dict": {f"student.{key}": value for key, value in network.state_dict().items()}, "flowanchor": meta},
        path,
    )
    return path


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({}, {"time_scale": 1000.0}, r"backbone.time_scale=1.0, and a network of backbone.time_scale=1000.0 cannot"),
        ({"num_heads": 1}, {}, "set backbone.num_heads=1, or initialise_from=null"),
        ({"predicts": "x"}, {}, "set backbone.predicts=x, or initialise_from=null"),
        ({"end_time": "gated"}, {"end_time": "auxiliary"}, "set backbone.end_time=gated"),
        ({"end_time": "gated"}, {"end_time": "gated", "end_time_gate": 0.5}, "set backbone.end_time_gate=0.25"),
    ],
)  # fmt: skip
def test_a_student_of_other_settings_is_refused_in_a_sentence(tmp_path, theirs, ours, said):
    settings = {**SMALL, **theirs}
    path = saved(filled(LightningDiT, **settings), tmp_path / "a.ckpt", **settings)
    student = filled(LightningDiT, **SMALL, **ours)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        initialise_student(student, path)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"class_dropout_prob": 0.3, "disable_label_dropout": True}),
        ({"time_scale": 1000.0}, {"time_scale": 1000}),
        ({}, {"end_time": "gated", "end_time_gate": 0.5}),
        ({"end_time": "decoupled"}, {"end_time": "gated"}),
        ({"end_time": "decoupled", "end_time_split": 1}, {"end_time": "decoupled", "end_time_split": 2}),
    ],
)
def test_what_answers_alike_may_start(tmp_path, theirs, ours):
    teacher, student = filled(LightningDiT, **SMALL, **theirs), filled(LightningDiT, **SMALL, **ours)
    initialise_student(student, saved(teacher, tmp_path / "a.ckpt", **SMALL, **theirs))
    torch.testing.assert_close(answer(student), answer(teacher))


def test_another_size_is_told_as_one(tmp_path):
    """A larger preset has more heads too: that it is larger is what its user must hear."""
    path = saved(filled(LightningDiT, **SMALL), tmp_path / "a.ckpt", **SMALL)
    with pytest.raises(CheckpointError, match="another shape of"):
        initialise_student(LightningDiT(**{**SMALL, "hidden_size": 32, "num_heads": 4}), path)


def test_a_dits_weights_fit_a_sit_and_mean_another_thing(tmp_path):
    base = BASES[SiT]
    for kind, other, said in ((DiT, SiT, "set backbone=dit"), (SiT, DiT, "set backbone=sit")):
        path = saved(filled(kind, **base), tmp_path / "a.ckpt", **base)
        with pytest.raises(ConfigError, match=said):
            initialise_student(filled(other, **base), path)
    student = filled(LightningDiT, **base)  # SiT's own trunk, with the same options
    initialise_student(student, path)
    assert torch.equal(answer(student), answer(filled(SiT, **base)))


def test_each_part_is_asked(tmp_path):
    heads = {**WAN, "num_attention_heads": 1, "attention_head_dim": 24}
    right = saved(filled(Wan, **WAN), tmp_path / "right.ckpt", **WAN)
    wrong = saved(filled(Wan, **heads), tmp_path / "wrong.ckpt", **heads)
    student = WanExperts(preset="nano", **WAN)
    initialise_student(student, {"high": str(right), "low": str(right)})
    with pytest.raises(ConfigError, match="wrong.ckpt has backbone.num_attention_heads=1"):
        initialise_student(student, {"high": str(right), "low": str(wrong)})


def test_a_teacher_may_have_settings_of_its_own(tmp_path):
    """It answers with its own scale: as a network beside the student it is asked, not copied."""
    settings = {**SMALL, "time_scale": 1000.0}
    own = filled(LightningDiT, **settings)
    teacher = CheckpointVelocity(str(saved(own, tmp_path / "a.ckpt", **settings)), guidance_scale=1.0)
    teacher.check(filled(LightningDiT, **SMALL))
    assert torch.equal(answer(teacher.network), answer(own))
