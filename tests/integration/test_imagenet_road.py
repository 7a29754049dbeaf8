"""The whole road of docs/imagenet.md at a small scale: from a folder of JPEGs to a score and a published folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flowanchor
from flowanchor.encoded.manifest import LatentManifest
from flowanchor.encoded.statistics import LatentStatistics

GOLDEN = Path(__file__).parents[1] / "golden" / "autoencoder.safetensors"
CLASSES = {"n01_red": (200, 40, 40), "n02_green": (40, 180, 60), "n03_blue": (50, 60, 210)}
PER_CLASS, SIZE = 12, 32  # the codec of the golden file maps 3 x 32 x 32 to 8 x 16 x 16

CODEC = ["codec=vavae", "codec.weights=vavae.pt", "codec.latent_channels=8", "codec.downsampling=2"]
NETWORK = [
    "backbone.preset=nano", "backbone.depth=2", "backbone.hidden_size=32", "backbone.num_heads=2",
    "backbone.patch_size=4",
]  # fmt: skip
RUN = [
    "data.channels=8", "data.size=16", "data.num_classes=3", "data.batch_size=12", "data.num_workers=0",
    "trainer.max_epochs=-1", "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.devices=1",
    "strategy=auto", "global_batch_size=null", "reference_batch_size=null", "optimizer.lr=2e-3", "threads=1",
    "ema.snapshot_every=null", "log_every_n_steps=1", "logger=csv", "callbacks.last.every_n_train_steps=20",
    "callbacks.sample_grid.per_class=1", "callbacks.sample_grid.nfe=[1]", "compile=false",
]  # fmt: skip


def make_images(root: Path) -> None:
    """Three classes of colours, of various sizes and shapes, as JPEG files."""
    draw = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (root / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            height, width = draw.integers(34, 60, 2)
            ramp = np.linspace(0.4, 1.2, width)[None, :, None] * np.array(colour)
            pixels = np.clip(ramp + draw.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03d}.jpg", quality=92)


def make_codec(path: Path) -> None:
    """A released-looking .pt of a small random VA-VAE."""
    weights = {k.removeprefix("state."): v for k, v in load_file(GOLDEN).items() if k.startswith("state.")}
    torch.save({"state_dict": weights}, path)


@pytest.fixture
def road(command, tmp_path, capsys):
    make_images(tmp_path / "images")
    make_codec(tmp_path / "vavae.pt")

    def go(program: str, *words: str) -> str:
        capsys.readouterr()
        command(program, *words)
        return capsys.readouterr().out

    return go


def losses(folder: Path) -> list[float]:
    lines = (folder / "csv" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]


@pytest.mark.slow
def test_from_jpegs_to_a_score_and_a_published_folder(road, tmp_path):
    encode = ["data.root=images", *CODEC, "image_size=32", "batch_size=12", "num_workers=0", "shard_size=15"]
    road("encode", *encode, "out=latents")
    road("encode", *encode, "out=tars", "format=webdataset")
    for folder, files in (("latents", 3), ("tars", 3)):
        manifest = LatentManifest.read(tmp_path / folder)
        assert manifest.count == 36 and manifest.shape == (8, 16, 16) and len(manifest.shards) == files
    assert LatentStatistics.read(tmp_path / "latents/latents_stats.pt").mean == pytest.approx(
        LatentStatistics.read(tmp_path / "tars/latents_stats.pt").mean, abs=1e-6
    )

    # Stage 1 from tars, stage 2 from the released layout: both read what encode.py wrote.
    runs = tmp_path / "outputs" / "train"
    road("train", "experiment=imagenet256_stage1", "data=webdataset", "data.root=tars", *CODEC, *NETWORK, *RUN,
         "trainer.max_steps=40", "name=stage1")  # fmt: skip
    assert np.mean(losses(runs / "stage1")[-5:]) < 0.99 * np.mean(losses(runs / "stage1")[:3])
    assert list((runs / "stage1" / "samples").glob("*.png")), "grids are drawn through the codec"

    # The teacher is taken through the authors' layout, as if it were their release.
    road("convert", "checkpoint=outputs/train/stage1", "output=stage1.pt", "format=authors")
    said = road("convert", "inspect=stage1.pt")
    assert "LightningDiT" in said
    road("convert", "checkpoint=stage1.pt", "output=teacher.safetensors")
    road("train", "experiment=imagenet256_facm", "data.root=latents", "teacher.checkpoint=teacher.safetensors", *CODEC,
         *NETWORK, *RUN, "jvp.recompute=false", "trainer.max_steps=6", "name=facm", "optimizer.lr=5e-4")  # fmt: skip
    assert len(losses(runs / "facm")) == 6 and np.isfinite(losses(runs / "facm")).all()
    config = (runs / "facm" / "config.yaml").read_text()
    assert "guidance_scale: 1.75" in config and "flowanchor.plugins.codecs.kl.KLCodec" in config

    road("sample", "checkpoint=outputs/train/facm", "num_samples=6", "sampler.steps=2", "seed=3", "device=cpu",
         "name=drawn")  # fmt: skip
    with np.load(tmp_path / "outputs/sample/drawn/samples.npz") as drawn:
        images, labels = drawn["images"], drawn["labels"]
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 5

    road("evaluate", "checkpoint=outputs/train/facm", "metric=random", "reference=images", "reference_crop=true",
         "nfe=[1,2]", "num_samples=24", "batch_size=12", "metric.cache_dir=cache", "device=cpu", "name=score",
         "metric.kid_subset_size=10")  # fmt: skip
    report = json.loads((tmp_path / "outputs/eval/score/metrics.json").read_text())
    assert [result["nfe"] for result in report["results"]] == [1, 2]
    assert all(np.isfinite(result["fd"]) and result["fd"] > 0 for result in report["results"])

    road("convert", "checkpoint=outputs/train/facm", "output=published", "format=huggingface", "with_codec=true",
         "metrics=outputs/eval/score/metrics.json")  # fmt: skip
    model = flowanchor.load(tmp_path / "published")
    again = np.asarray(model.sample(labels.tolist(), steps=2, seed=3))
    assert np.abs(again.astype(int) - images.astype(int)).max() <= 1
    assert "FD-random" in (tmp_path / "published" / "README.md").read_text()


def test_a_codec_of_other_weights_is_refused(road, tmp_path, command, capsys):
    encode = ["data.root=images", *CODEC, "image_size=32", "batch_size=12", "num_workers=0", "shard_size=80"]
    road("encode", *encode, "out=latents")
    content = torch.load(tmp_path / "vavae.pt", weights_only=True)
    content["state_dict"]["decoder.conv_out.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    train = ["experiment=imagenet256_stage1", "data.root=latents", *NETWORK, *RUN, "trainer.max_steps=1"]
    for words, sentence in (
        ([*CODEC, "codec.weights=other.pt"], "latents was encoded by other weights than codec.weights=other.pt"),
        (["codec=identity"], "latents was encoded by vavae and the run has codec=identity"),
        ([*CODEC, "data.num_classes=4"], "use data.num_classes=3"),
    ):
        with pytest.raises(SystemExit):
            command("train", *train, *words, "name=refused")
        assert sentence in capsys.readouterr().err
