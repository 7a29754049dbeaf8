"""A transformer of diffusers through the programs: its folder as teacher and start of a student; resumed, sampled."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from safetensors.torch import load_file

from flowanchor.checkpoints import load_model
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Backbone
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.text.base import Tokens

SIZES = {
    "in_channels": 3, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 384, "axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network of diffusers, and captioned pictures, encoded."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    Flux2Transformer2DModel(**SIZES).save_pretrained(folder / "flux2" / "transformer")
    (folder / "images").mkdir()
    rows = []
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        rows.append(json.dumps({"file": f"{number}.png", "caption": f"picture {number}"}))
    (folder / "images" / "captions.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.chdir(place)

    def program(name: str, *words: str) -> None:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"src/{name}.py", *words])
        import_module(f"flowanchor.programs.{name}").main()

    return program


TRAIN = (
    "backbone=diffusers", "initialise_from=flux2", "backbone.text_len=16", "teacher=checkpoint",
    "teacher.checkpoint=flux2", "data=captions", "data.root=encoded", "data.channels=3", "data.height=8",
    "data.width=8", "data.text_dim=384", "data.batch_size=4", "data.num_workers=0", "codec=identity",
    "text_encoder=minilm", "trainer.limit_val_batches=0", "callbacks.best=null",
    "callbacks.sample_grid=null", "threads=1", "name=student",
)  # fmt: skip


def test_distilled_resumed_and_sampled(place, run):
    run(
        "encode", "data=captions", "data.root=images", "codec=identity", "text_encoder=minilm", "image_size=8",
        "captions.multiple=8", "captions.max_ratio=1", "num_workers=0", "out=encoded",
    )  # fmt: skip
    run("train", *TRAIN, "trainer.max_steps=1")
    run("train", *TRAIN, "trainer.max_steps=2")
    student = load_model("outputs/train/student")
    assert student.step == 2 and student.backbone.network.config.joint_attention_dim == 384
    start = load_model("flux2").backbone.state_dict()
    assert student.backbone.state_dict().keys() == start.keys()
    apart = [float((value - start[name]).abs().max()) for name, value in student.backbone.state_dict().items()]
    assert 0 < max(apart) < 0.1, "it has learned, from the weights of the folder"
    shutil.move("flux2", "elsewhere")  # a trained network needs its folder no more
    try:
        drawing = ("prompt=a", "num_samples=2", "device=cpu", "sampler.steps=2")
        run("sample", "checkpoint=outputs/train/student", "hydra.run.dir=drawn", *drawing)
        run("convert", "checkpoint=outputs/train/student", "output=student.safetensors")
        run("convert", "checkpoint=outputs/train/student", "output=stock", "format=transformer")
        run("convert", "checkpoint=outputs/train/student", "output=low", "format=transformer", "dtype=bfloat16")
        run("sample", "checkpoint=student.safetensors", "hydra.run.dir=again", *drawing)
    finally:
        shutil.move("elsewhere", "flux2")
    pictures = [np.load(place / name / "samples.npz")["images"] for name in ("drawn", "again")]
    assert pictures[0].shape == (2, 8, 8, 3) and np.array_equal(*pictures)
    (place / "prompts.txt").write_text("a\nb")
    measuring = ("metric=random", "metric.cache_dir=cache", "reference=images", "prompts=prompts.txt", "batch_size=2")
    run(
        "evaluate", "checkpoint=outputs/train/student", "nfe=[2]", "num_samples=6", "device=cpu",
        "hydra.run.dir=measured", *measuring,
    )  # fmt: skip
    assert json.loads((place / "measured" / "metrics.json").read_text())["results"][0]["n"] == 6
    written = Flux2Transformer2DModel.from_pretrained(place / "stock", local_files_only=True).state_dict()
    average = student.backbone.state_dict()
    assert written.keys() == average.keys() and all(torch.equal(average[name], written[name]) for name in written)
    low = load_file(next((place / "low").glob("*.safetensors")))
    assert low.keys() == average.keys() and {value.dtype for value in low.values()} == {torch.bfloat16}
    assert load_model("stock").backbone.network.config.num_layers == SIZES["num_layers"]
    with pytest.raises(SystemExit):
        run("convert", "checkpoint=digits", "output=other", "format=transformer")


@pytest.mark.filterwarnings("error:The teacher")
def test_a_stock_teacher_reads_texts_as_far_as_the_student(place):
    """Its folder says of no length: with the student's weights it gives the student's answer."""
    student = initialised(place / "flux2", text_len=16)
    teacher = CheckpointVelocity(str(place / "flux2"), guidance_scale=1.0)
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8]), Tokens(torch.randn(2, 16, 384))
    with torch.no_grad():
        wanted = student.predict(x, t, text)
        apart = teacher(x, t, text, x, student, PlainInterval()) - wanted
        assert apart.norm() > 1e-3 * wanted.norm(), "512 tokens, most of them zeros"
        teacher.check(student)
        assert torch.equal(teacher(x, t, text, x, student, PlainInterval()), wanted)


def initialised(folder: Path, **settings: Any) -> Backbone:
    stock = load_model(folder).backbone
    student = DiffusersTransformer("Flux2Transformer2DModel", SIZES, **settings)
    student.load_state_dict(stock.state_dict())
    return student.eval()


def test_a_lora_of_it_taught_by_its_base(place, run):
    """Trained, resumed, and written for stock diffusers, which finds it beside the layers that were trained."""
    lora = [word for word in TRAIN if not word.startswith(("teacher", "name="))]
    lora += [
        "teacher=base",
        "backbone.lora.rank=2",
        "backbone.lora.alpha=4",
        "ema=none",
        "optimizer.lr=0.01",
        "name=lora",
    ]
    run("train", *lora, "trainer.max_steps=1")
    run("train", *lora, "trainer.max_steps=2")
    run("train", *lora, "trainer.max_steps=2", "name=without_a_break")
    ends = [load_model(f"outputs/train/{name}").backbone.state_dict() for name in ("lora", "without_a_break")]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    run("convert", "checkpoint=outputs/train/lora", "output=lora", "format=lora", "steps=4", "base_model=some/flux2")
    stock = Flux2Transformer2DModel.from_pretrained("flux2/transformer")
    stock.load_lora_adapter("lora", weight_name="pytorch_lora_weights.safetensors")
    backbone = load_model("outputs/train/lora").backbone
    theirs = {name: p for name, p in stock.named_parameters() if ".lora_" in name}
    ours = {name: p for name, p in backbone.named_parameters() if ".lora_" in name}
    assert len(theirs) == len(ours) and any(p.any() for name, p in ours.items() if ".lora_B." in name)
    for name, value in ours.items():
        found = theirs[name.replace(".default.", ".default_0.")]
        assert torch.equal(found, 2 * value if ".lora_B." in name else value)
    assert "some/flux2" in (place / "lora" / "README.md").read_text()


def test_folders_that_are_not_opened(place, tmp_path):
    folder = tmp_path / "network"
    shutil.copytree(place / "flux2" / "transformer", folder)
    config = json.loads((folder / "config.json").read_text())

    def opened(**changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return load_model(folder)

    assert opened().kind == "flow"
    with pytest.raises(CheckpointError, match="asks for code of its own choice .auto_map"):
        opened(auto_map={"AutoModel": "mine.py"})
    with pytest.raises(ConfigError, match="Nothing describes how MochiTransformer3DModel.*add_a_diffusers_model"):
        opened(_class_name="MochiTransformer3DModel")
    with pytest.raises(CheckpointError, match="far larger than the weights"):
        opened(num_layers=4000)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        opened()
