"""The recipes of few-step LoRAs: their settings, and each from pictures to a LoRA on a small pipeline of its class."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open

from flowanchor.plugins.backbones.wan import Wan
from flowanchor.programs.launch import prepare

from ..plugins.diffusers_cases import FLUX, QWEN, SD35, Z_IMAGE
from ..text.pipelines import write_pipeline

# Guidance of the teacher and shift of the times, typed from the releases' cards and schedulers.
CONSTANTS: dict[str, dict[str, Any]] = {
    "sd35m_lora_facm": {"teacher.guidance_scale": 4.5, "objective.time.shift": 0.333, "data.text_dim": 4096},
    "flux1_lora_facm": {"teacher.guidance_scale": 1.0, "objective.time.shift": 0.316, "data.text_dim": 4096},
    "zimage_lora_facm": {"teacher.guidance_scale": 6.0, "objective.time.shift": 0.333, "data.text_dim": 2560},
    "qwenimage_lora_facm": {"teacher.guidance_scale": 4.0, "objective.time.shift": 0.5, "data.text_dim": 3584},
    "wan21_1p3b_lora_anyflow": {
        "teacher.guidance_scale": 5.0, "objective.time.shift": 0.2, "data.text_dim": 4096, "backbone.preset": "1.3B",
        "objective.interval.end_time": "gated",
    },
}  # fmt: skip
CONF = Path(__file__).parents[2] / "conf" / "experiment"
TWO = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "latent_channels": 4}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
LISTED = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}  # fmt: skip


@cache
def composed(recipe: str) -> Any:
    """A recipe's configuration, which tests only read."""
    prepare()
    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        return compose("train", overrides=[f"experiment={recipe}"])


def test_every_recipe_is_here():
    assert {path.stem for path in CONF.glob("*_lora_*.yaml")} == set(CONSTANTS)


@pytest.mark.parametrize("recipe", CONSTANTS)
def test_constants(recipe):
    """One card, bfloat16, compiled blocks, what fits is kept; the base teaches, adapters learn."""
    cfg = composed(recipe)
    for key, value in CONSTANTS[recipe].items():
        assert OmegaConf.select(cfg, key) == value, key
    assert cfg.compile is True and cfg.trainer.precision == "bf16-mixed" and cfg.trainer.devices == 1
    assert cfg.base_dtype in ("bfloat16", "int8") and cfg.jvp.recompute == "auto" and cfg.backbone.lora.rank == 64
    assert cfg.teacher._target_.endswith("BaseVelocity") and cfg.teacher.guidance_low == 0.0
    assert cfg.backbone.tangent_smoothing == 0.01
    comment = "".join(line for line in (CONF / f"{recipe}.yaml").open() if line.startswith("#"))
    for said in (f"experiment={recipe} ", "Needs:", "a plan; not measured", "Hours: not measured", "ours"):
        assert said in comment, said
    assert "@" not in comment.replace("@package", "")


def sd3_like() -> tuple[Any, Any]:
    sizes = {**SD35, "pooled_projection_dim": 8 + 2 + 12 + 2}
    return diffusers.SD3Transformer2DModel(**sizes), diffusers.AutoencoderKL(**TWO, **BLOCKS, shift_factor=0.06)


def flux_like() -> tuple[Any, Any]:
    sizes = {**FLUX, "pooled_projection_dim": 8, "guidance_embeds": True}
    return diffusers.FluxTransformer2DModel(**sizes), diffusers.AutoencoderKL(**TWO, **BLOCKS, shift_factor=0.1)


def zimage_like() -> tuple[Any, Any]:
    sizes = {**Z_IMAGE, "axes_lens": [1024, 64, 64]}
    return diffusers.ZImageTransformer2DModel(**sizes), diffusers.AutoencoderKL(**TWO, **BLOCKS, shift_factor=0.1)


def qwen_like() -> tuple[Any, Any]:
    return diffusers.QwenImageTransformer2DModel(**QWEN), diffusers.AutoencoderKLQwenImage(**LISTED)


PIPELINES: dict[str, tuple[str, Any]] = {
    "sd35m_lora_facm": ("StableDiffusion3Pipeline", sd3_like),
    "flux1_lora_facm": ("FluxPipeline", flux_like),
    "zimage_lora_facm": ("ZImagePipeline", zimage_like),
    "qwenimage_lora_facm": ("QwenImagePipeline", qwen_like),
}
SMALL = [
    "data.channels=4", "data.height=8", "data.width=8", "data.num_workers=0", "backbone.lora.rank=2",
    "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.accumulate_grad_batches=1",
    "objective.anchor_warmup_steps=1", "compile=false", "codec.dtype=float32",
]  # fmt: skip


def base_dtype(recipe: str) -> str:
    """The recipe's eight bits; bfloat16 is for runs that cast."""
    return str(composed(recipe).base_dtype).replace("bfloat16", "float32")


def pictures(folder: Path) -> None:
    folder.mkdir()
    rows = []
    for number, word in enumerate(("red", "blue", "green", "grey", "pink", "white")):
        Image.new("RGB", (64, 64), (40 * number, 0, 99)).save(folder / f"{number}.png")
        rows.append(json.dumps({"file": f"{number}.png", "caption": f"a {word} square"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))


def check_evaluation(command: Any, folder: Path) -> None:
    """By a network of random weights, which needs no download: two steps, and the pictures that taught it."""
    command(
        "evaluate", "checkpoint=outputs/train/run", "nfe=[2]", "num_samples=6", "batch_size=3", "device=cpu",
        "metric=random", "metric.cache_dir=cache", "reference=images", "prompts=images/captions.jsonl",
        "hydra.run.dir=measured",
    )  # fmt: skip
    (found,) = json.loads((folder / "measured" / "metrics.json").read_text())["results"]
    assert (found["nfe"], found["n"]) == (2, 6) and found["fd"] > 0


def check_lora(file: Path, prefixes: tuple[str, ...]) -> None:
    """Its names are those of the stock loaders, and it says something."""
    with safe_open(file, framework="pt") as content:
        names = list(content.keys())
        assert names and all(name.startswith(prefixes) for name in names)
        assert any(bool(content.get_tensor(name).any()) for name in names if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PIPELINES)
def test_from_pictures_to_a_lora(recipe, command, tmp_path):
    """Encoded by the pipeline's own parts, two steps, a third after a stop, drawn by a prompt, measured, exported."""
    stock, parts = PIPELINES[recipe]
    folder = write_pipeline(stock, tmp_path / "pipeline")
    torch.manual_seed(1)
    for name, part in zip(("transformer", "vae"), parts(), strict=True):
        part.save_pretrained(folder / name)
    pictures(tmp_path / "images")
    command(
        "encode", "data=captions", "data.root=images", "codec=pipeline", "codec.weights=pipeline",
        "text_encoder=pipeline", "text_encoder.weights=pipeline", "text_encoder.dtype=float32", "codec.dtype=float32",
        "image_size=64", "captions.max_ratio=1", "num_workers=0", "out=encoded",
    )  # fmt: skip
    train = [
        f"experiment={recipe}", "initialise_from=pipeline", "data.root=encoded", "data.text_dim=24", *SMALL,
        "text_encoder.dtype=float32", f"base_dtype={base_dtype(recipe)}", "name=run",
    ]  # fmt: skip
    command(
        "train", *train, "trainer.max_steps=2", "callbacks.sample_grid.nfe=[2]", "callbacks.sample_grid.every_n_steps=2"
    )
    run = tmp_path / "outputs" / "train" / "run"
    assert (run / "samples" / "step_00000002.png").is_file()
    command("train", *train, "trainer.max_steps=3", "callbacks=none")
    assert len(json.loads((run / "provenance.json").read_text())["resumed"]) == 1
    command(
        "sample", "checkpoint=outputs/train/run", "prompt=a red square", "size=64x96", "sampler.steps=2",
        "num_samples=2", "hydra.run.dir=drawn",
    )  # fmt: skip
    with Image.open(tmp_path / "drawn" / "grid.png") as image:
        assert image.width >= 2 * 64
    check_evaluation(command, tmp_path)
    command("convert", "checkpoint=outputs/train/run", "output=lora", "format=lora", "steps=4")
    check_lora(next((tmp_path / "lora").glob("*.safetensors")), ("transformer.",))


@pytest.mark.slow
def test_wan_with_an_end_time(command, tmp_path):
    """Adapters and the embedder of the end; what it is exported as: tests/plugins/formats/test_anyflow_pipeline.py."""
    folder = tmp_path / "pipeline"
    torch.manual_seed(1)
    sizes = {"num_layers": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16, "text_dim": 384}
    network = Wan.from_preset("nano", **sizes, in_channels=4, height=8, width=8)
    torch.nn.init.normal_(network.proj_out.weight, std=0.1)
    network.transformer().save_pretrained(folder / "transformer")
    diffusers.AutoencoderKLWan(**LISTED).save_pretrained(folder / "vae")
    pictures(tmp_path / "images")
    codec = ["codec.weights=pipeline", "codec.latent_channels=4", "codec.dtype=float32"]
    command(
        "encode", "data=captions", "data.root=images", "codec=wan_vae", *codec, "text_encoder=minilm", "image_size=64",
        "captions.max_ratio=1", "num_workers=0", "out=encoded",
    )  # fmt: skip
    ours = {**sizes, "preset": "nano", "text_len": 24}
    nano = [f"backbone.{name}={value}" for name, value in ours.items() if name != "text_dim"] + ["data.text_dim=384"]
    train = [
        "experiment=wan21_1p3b_lora_anyflow", "initialise_from=pipeline/transformer", *codec, "text_encoder=minilm",
        "~text_encoder.weights", "data.root=encoded", "data.text_dim=384", *SMALL, *nano,
        "~callbacks.sample_grid", "base_dtype=float32", "name=run",
    ]  # fmt: skip
    train = [
        word for word in train if word != "objective.anchor_warmup_steps=1" and not word.startswith("backbone.text_dim")
    ]
    command("train", *train, "trainer.max_steps=2")
    command("train", *train, "trainer.max_steps=3")
    command(
        "sample", "checkpoint=outputs/train/run", "prompt=a red square", "sampler.steps=2", "num_samples=2",
        "hydra.run.dir=drawn",
    )  # fmt: skip
    assert (tmp_path / "drawn" / "grid.png").is_file()
    check_evaluation(command, tmp_path)
