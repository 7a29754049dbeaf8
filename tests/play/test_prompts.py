"""Drawing by prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flowanchor
from flowanchor.errors import ConfigError
from flowanchor.play.choices import can_be_guided, class_names
from flowanchor.play.drawing import Wish, between, draw
from flowanchor.play.pictures import grid
from flowanchor.plugins.backbones.wan import Wan

PLUGINS = "flowanchor.plugins"
SMALL = {
    "in_channels": 3, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 2, "freq_dim": 32, "text_dim": 384, "text_len": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = Wan(**SMALL)
    torch.nn.init.normal_(network.proj_out.weight, std=0.3)
    config = {
        "backbone": {"_target_": f"{PLUGINS}.backbones.wan.Wan", **SMALL},
        "objective": {"interval": {"_target_": f"{PLUGINS}.objectives.intervals.expanded.ExpandedInterval"}},
        "sampler": {"_target_": f"{PLUGINS}.samplers.consistency.ConsistencySampler", "steps": 2},
        "codec": {"_target_": f"{PLUGINS}.codecs.identity.Identity"},
        "text_encoder": {"_target_": f"{PLUGINS}.text_encoders.minilm.MiniLM"},
    }
    path = tmp_path_factory.mktemp("text") / "last.ckpt"
    content = {
        "state_dict": {f"student.{name}": value for name, value in network.state_dict().items()},
        "flowanchor": {"format": 1, "kind": "shortcut", "step": 1, "config": config},
    }
    torch.save(content, path)
    return flowanchor.load(path)


def test_a_row_of_pictures_per_prompt(model):
    wish = Wish(seed=2, each=2, prompts=("a red fox", "seven"), steps=2)
    drawn = draw(model, wish)
    same = model.sample(prompts=["a red fox", "a red fox", "seven", "seven"], steps=2, seed=2)
    assert np.array_equal(drawn.images, same.numpy())
    assert drawn.images.shape == (4, 8, 8, 3) and drawn.calls == 2
    assert grid(drawn).width > 2 * 8 * 12  # with the prompts beside their rows


def test_guidance_and_the_negative_prompt(model):
    assert can_be_guided(model) and class_names(model) == []
    wish = Wish(prompts=("seven",), steps=1, guidance=3.0, each=1)
    guided = draw(model, wish)
    assert guided.calls == 2
    other = draw(model, Wish(prompts=("seven",), steps=1, guidance=3.0, each=1, negative="a red fox"))
    assert not np.array_equal(guided.images, other.images)


def test_between_seeds_and_without_a_prompt(model):
    assert between(model, Wish(prompts=("seven",), steps=1), 5, count=3).images.shape == (3, 8, 8, 3)
    with pytest.raises(ConfigError, match="one prompt a line"):
        draw(model, Wish())
