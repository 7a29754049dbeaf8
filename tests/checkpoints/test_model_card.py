"""What a published folder says of itself, and that the call it shows works."""

from __future__ import annotations

import re

import pytest
import torch

from flowanchor.checkpoints.huggingface import write_folder
from flowanchor.checkpoints.model_card import model_card
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.wan import Wan

WAN = {
    "in_channels": 3, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 1, "freq_dim": 32, "text_dim": 384, "text_len": 12,
}  # fmt: skip
DIT = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
NETWORKS = {
    "texts": (Wan, WAN, "3 x 1 x 8 x 8, texts of 384 channels"),
    "classes": (LightningDiT, {**DIT, "num_classes": 3}, "1 x 4 x 4, 3 classes"),
    "neither": (LightningDiT, {**DIT, "num_classes": 0, "class_dropout_prob": 0.0}, "1 x 4 x 4, unconditional"),
}


def described(kind, **parts):
    network, settings, _ = NETWORKS[kind]
    config = {
        "backbone": {"_target_": f"{network.__module__}.{network.__name__}", **settings},
        "objective": {"interval": {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}},
        "sampler": {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2},
        "codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"},
        "text_encoder": {"_target_": "flowanchor.plugins.text_encoders.minilm.MiniLM", "max_length": 12},
    }
    return {"format": 1, "kind": "shortcut", "step": 7, "config": {**config, **parts}}


def weights(kind):
    torch.manual_seed(0)
    network, settings, _ = NETWORKS[kind]
    return network(**settings).state_dict()


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_call_that_it_shows_works(kind, tmp_path):
    meta = described(kind)
    card = model_card("mine", meta, "none", None, weights(kind))
    assert f"| samples | {NETWORKS[kind][2]} |" in card
    write_folder(tmp_path / "folder", weights(kind), meta, "none", card)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    found: dict = {}
    exec(code.replace("path/of/this/folder", str(tmp_path / "folder")), found)  # of this file alone
    assert found["images"].shape[0] == 8 and found["images"].dtype == torch.uint8


def test_weights_that_are_not_published_are_asked_for():
    codec = {"_target_": "flowanchor.plugins.codecs.wan_vae.WanVAE", "weights": None}
    meta = described(
        "texts", codec=codec, text_encoder={"_target_": "flowanchor.plugins.text_encoders.umt5.UMT5", "weights": None}
    )
    card = model_card("mine", meta, "none", None, weights("texts"))
    where = '{"weights": "path/of/its/weights"}'
    assert f'flowanchor.load("path/of/this/folder", codec={where}, text_encoder={where})' in card
    card = model_card("mine", meta, "none", None, weights("texts"), with_codec=True)
    assert f'flowanchor.load("path/of/this/folder", text_encoder={where})' in card


def test_parts_that_nobody_knows_are_chosen_on_the_command_line():
    card = model_card("mine", described("texts", sampler=None, text_encoder=None), "none", None, weights("texts"))
    assert "checkpoint=path/of/this/folder sampler=NAME text_encoder=NAME" in card and "flowanchor.load" not in card


def test_the_network_of_a_plugin_package_that_is_not_here():
    meta = described("classes")
    meta["config"]["backbone"]["_target_"] = "elsewhere.net.Net"
    assert "| samples | those of its plugin package |" in model_card("mine", meta, "none", None, {})


def test_every_score_of_the_report_is_in_it():
    line = {"sampler": "consistency", "nfe": 2, "fd": 12.345, "clip_score": 27.5, "n": 50, "protocol": "balanced"}
    settings = {"data": "prompts.txt", "metric": "t2i"}
    card = model_card("mine", described("texts"), "none", {"settings": settings, "results": [line]}, weights("texts"))
    assert "| CLIP score |" in card and "| 27.5 |" in card and "type: clip_score" in card
