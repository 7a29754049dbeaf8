"""The recipes for Wan: their constants, and a step of each with a small network, VAE and text encoder."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from importlib import import_module

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from flowanchor.checkpoints import load_model
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.programs.launch import prepare
from flowanchor.text.base import Tokens

SMALL = [
    "backbone.preset=nano", "backbone.num_layers=2", "backbone.attention_head_dim=12", "backbone.ffn_dim=32",
    "backbone.freq_dim=16", "backbone.text_len=24", "data.text_dim=384", "data.channels=4", "data.height=4",
    "data.width=4", "trainer.devices=1", "trainer.precision=32-true", "trainer.accelerator=cpu", "strategy=auto",
    "compile=false",
]  # fmt: skip
CONSTANTS = {
    "wan21_t2i_1p3b_facm": {"backbone.preset": "1.3B", "teacher.guidance_scale": 5.0, "objective.time.shift": 0.2},
    "wan22_t2i_facm": {
        "backbone.preset": "A14B", "backbone.boundary": 0.875, "teacher.boundary": 0.875,
        "teacher.guidance_scale_high": 4.0, "teacher.guidance_scale_low": 3.0, "teacher.one_side": True,
        "objective.time.boundary": 0.125, "objective.time.time.shift": 0.2, "objective.shortcut.boundaries": [0.125],
        "sampler.boundaries": [0.125],
    },
    "wan22_t2i_high_facm": {
        "backbone.preset": "A14B", "teacher.guidance_scale": 4.0, "objective.time.low": 0.0,
        "objective.time.high": 0.125, "objective.shortcut.boundaries": [0.125], "sampler.boundaries": [0.125],
    },
    "wan22_t2i_low_facm": {
        "backbone.preset": "A14B", "teacher.guidance_scale": 3.0, "objective.time.low": 0.125,
        "objective.time.high": 1.0, "objective.shortcut.boundaries": [0.125], "sampler.boundaries": [0.125],
    },
}  # fmt: skip
EXPERTS = ["teacher.high=weights/transformer", "teacher.low=weights/transformer_2"]
WHOLE = {
    "Wan 2.1": ["experiment=wan21_t2i_1p3b_facm", "teacher.checkpoint=weights/transformer"],
    "two experts": ["experiment=wan22_t2i_facm", *EXPERTS],
    "one student of two": [
        "experiment=wan22_t2i_facm", *EXPERTS, "backbone=wan", "objective/time=shifted",
        "objective.shortcut.boundaries=[]", "sampler.boundaries=[]", "teacher.one_side=false",
        "initialise_from=weights/transformer_2",
    ],
}  # fmt: skip
HALVES = ("wan22_t2i_high_facm", "wan22_t2i_low_facm")


@cache
def composed(recipe):
    """A recipe's configuration, which tests only read."""
    prepare()
    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        return compose("train", overrides=[f"experiment={recipe}"])


@pytest.mark.parametrize("recipe", CONSTANTS)
def test_constants(recipe):
    cfg = composed(recipe)
    for key, value in CONSTANTS[recipe].items():
        assert OmegaConf.select(cfg, key) == value, key
    assert (
        cfg.compile is True
        and cfg.trainer.precision == "bf16-mixed"
        and cfg.strategy._target_.endswith("ChainJVPStrategy")
    )
    assert cfg.jvp._target_.endswith("Chain") and cfg.objective.interval._target_.endswith("ExpandedInterval")
    assert cfg.objective.anchor_warmup_steps > 0 and cfg.backbone.tangent_smoothing == 0.01


def test_halves_draw_their_times_as_the_whole_does():
    """Each expert's law is that of shift 5, given its side of the boundary: equal quantiles."""
    sigma = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    t = (1 - 5 * sigma / (1 + 4 * sigma)).sort().values
    share = torch.linspace(0, 1, 9, dtype=torch.float64)
    for recipe, side in zip(HALVES, (t <= 0.125, t >= 0.125), strict=True):
        time = instantiate(composed(recipe).objective.time, _convert_="all")
        torch.testing.assert_close(time.from_draw(share), t[side].quantile(share), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline folder with two experts and a VAE, and captioned images encoded with them."""
    from diffusers import AutoencoderKLWan

    tmp_path = tmp_path_factory.mktemp("made")
    folder = tmp_path / "weights"
    for number, name in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(number)
        network = Wan.from_preset(
            "nano", num_layers=2, attention_head_dim=12, ffn_dim=32, freq_dim=16, text_dim=384, in_channels=4, height=4,
            width=4,
        )  # fmt: skip
        torch.nn.init.normal_(network.proj_out.weight, std=0.1)
        network.transformer().save_pretrained(folder / name)
    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).save_pretrained(folder / "vae")
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(8):
        Image.new("RGB", (32, 32), (30 * number, 0, 99)).save(tmp_path / "images" / f"{number}.png")
        rows.append(json.dumps({"file": f"{number}.png", "caption": f"colour number {number}"}))
    (tmp_path / "images" / "captions.jsonl").write_text("\n".join(rows))
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["src/encode.py", *ENCODE])
        import_module("flowanchor.programs.encode").main()
    return tmp_path


@pytest.fixture
def weights(made, tmp_path):
    """A copy of them in the folder of a test."""
    for name in ("weights", "encoded"):
        shutil.copytree(made / name, tmp_path / name)


CODEC = ["codec=wan_vae", "codec.weights=weights", "codec.latent_channels=4", "codec.dtype=float32"]


ENCODE = [
    "data=captions", "data.root=images", *CODEC, "image_size=32", "captions.max_ratio=1", "num_workers=0",
    "text_encoder=minilm", "out=encoded",
]  # fmt: skip
TRAIN = [
    *SMALL, *CODEC, "text_encoder=minilm", "data.root=encoded", "data.batch_size=4", "data.num_workers=0",
    "trainer.max_steps=2", "objective.anchor_warmup_steps=1",
]  # fmt: skip


@pytest.mark.parametrize("recipe", WHOLE)
def test_it_trains_and_draws(recipe, command, weights):
    """Warm-up of the anchor, then both terms; a grid by the VAE; a sample by prompt at another size."""
    planned = [] if recipe == "Wan 2.1" else ["jvp.recompute=false"]  # what jvp.recompute=auto finds here
    folder = command(
        "train", *WHOLE[recipe], *TRAIN, *planned, "callbacks.sample_grid.nfe=[2]",
        "callbacks.sample_grid.max_classes=2", "name=run",
    )  # fmt: skip
    run = folder / "outputs" / "train" / "run"
    assert (run / "samples" / "step_00000002.png").is_file()
    command(
        "sample", "checkpoint=outputs/train/run", "prompt=colour number 3", "size=48x32", "sampler.steps=2",
        "num_samples=2", "hydra.run.dir=drawn",
    )  # fmt: skip
    with Image.open(folder / "drawn" / "grid.png") as image:
        assert image.width > 2 * 48


@pytest.mark.parametrize("lora", [[], ["backbone.lora.rank=2"]], ids=["all weights", "adapters"])
def test_one_expert_after_the_other_becomes_one_network(command, weights, lora):
    quiet = ["jvp.recompute=false", "callbacks.sample_grid=null", "callbacks.best=null", "trainer.limit_val_batches=0"]
    for recipe, teacher in zip(HALVES, ("transformer", "transformer_2"), strict=True):
        command("train", f"experiment={recipe}", f"teacher.checkpoint=weights/{teacher}", *TRAIN, *quiet, *lora)
    runs = "{high: outputs/train/wan22_t2i_high_facm, low: outputs/train/wan22_t2i_low_facm}"
    folder = command("convert", f"checkpoint={runs}", "output=pair.safetensors")
    command("sample", "checkpoint=pair.safetensors", "prompt=colour number 3", "num_samples=1", "hydra.run.dir=drawn")
    assert (folder / "drawn" / "grid.png").is_file()
    pair = load_model("pair.safetensors").backbone
    x, text = torch.randn(1, 4, 1, 4, 4), Tokens(torch.randn(1, 3, 384))
    for name, t in zip(HALVES, ([0.0], [0.5]), strict=True):
        alone = load_model(f"outputs/train/{name}").backbone
        with torch.no_grad():
            assert torch.equal(pair(x, torch.tensor(t), text), alone(x, torch.tensor(t), text)), name


def test_released_weights_draw_by_themselves(command, weights):
    words = [*CODEC, "text_encoder=minilm", "sampler=flow", "sampler.steps=2", "sampler.guidance_scale=4"]
    folder = command(
        "sample", "checkpoint=weights/transformer", *words, "prompt=colour number 3", "size=48x32", "num_samples=2",
        "hydra.run.dir=drawn",
    )  # fmt: skip
    assert (folder / "drawn" / "grid.png").is_file()
