"""FD-DINOv2 against Pillow, the stock network and scipy's matrix root; what a broken folder is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from transformers import Dinov2Config, Dinov2Model, ViTConfig

from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.reference import open_reference
from flowanchor.plugins.metrics.dinov2 import Dinov2, Dinov2Metric, prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights, positions for 4 x 4 patches, which are stretched to 16 x 16."""
    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=56, patch_size=14, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2
    )
    network = Dinov2Model(config)
    for parameter in network.parameters():  # the usual start hardly tells two inputs apart
        torch.nn.init.normal_(parameter, std=0.4)
    place = tmp_path_factory.mktemp("dinov2")
    network.save_pretrained(place)
    return place


def images(count: int, seed: int, channels: int = 3) -> torch.Tensor:
    """Each of a colour of its own, with grain; those of another seed are brighter."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(100 * seed, 200, (count, channels, 1, 1), generator=generator)
    return (colour + torch.randint(0, 50, (count, channels, 20, 20), generator=generator)).to(torch.uint8)


def by_hand(folder: Path, pictures: torch.Tensor) -> np.ndarray:
    """Features of uint8 [N, 3, H, W]: Pillow's bicubic, numpy, a network of transformers; one at a time."""
    network, found = Dinov2Model.from_pretrained(folder).eval(), []
    for picture in pictures:
        small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = (np.asarray(small) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            out = network(torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None])
        found.append(out.last_hidden_state[0, 0].double().numpy())
    return np.stack(found)


def test_images_are_prepared_as_pillow_does():
    given = images(2, 1)
    small = Image.fromarray(given[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = (np.asarray(small) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    levels = np.abs(prepared(given)[0].permute(1, 2, 0).numpy() - pixels) * 255 * [0.229, 0.224, 0.225]
    assert levels.max() < 2.01 and (levels > 0.01).mean() < 0.05  # of 255: the two round half-way values apart


def test_the_distance_is_that_of_the_class_tokens(folder, tmp_path):
    drawn, real = images(14, 0), images(30, 1)
    (tmp_path / "real").mkdir()
    for number, image in enumerate(real):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{number:02d}.png")
    metric = instantiate(compose(f"metric.dinov2={folder}", "metric=dinov2", program="eval").metric, cache_dir=None)
    evaluator = Evaluator(metric, None, batch_size=5, reference=open_reference(str(tmp_path / "real"), (3, 20, 20)))
    found = evaluator.collect(drawn.split(6), evaluator.wanted(14))
    features = [by_hand(folder, part) for part in (drawn, real)]
    (a, s), (b, z) = ((part.mean(0), np.cov(part, rowvar=False)) for part in features)
    expected = ((a - b) ** 2).sum() + np.trace(s + z - 2 * sqrtm(s @ z).real)
    scores = evaluator.score_collected(found)
    assert evaluator.label == "FD-DINOv2" and scores.inception_score is None
    assert scores.fd == pytest.approx(expected, rel=0.01)  # a pixel may be rounded the other way
    assert scores.fd > 0.01


def test_gray_images_are_repeated(folder):
    metric, gray = Dinov2Metric(str(folder)), images(1, 0, channels=1)[0]
    assert torch.equal(metric.prepare(gray), gray.repeat(3, 1, 1))


def test_what_is_no_dinov2(folder, tmp_path):
    with pytest.raises(ConfigError, match="add metric.dinov2=FOLDER"):
        Dinov2(None)
    with pytest.raises(CheckpointError, match="There is no folder"):
        Dinov2(tmp_path / "nothing")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(CheckpointError, match="says vit"):
        Dinov2(tmp_path / "vit")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot be read as DINOv2"):
        Dinov2(broken)
    weights = load_file(folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="it lacks layernorm.weight"):
        Dinov2(broken)
    code = tmp_path / "code"
    code.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (code / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "mine.Model"}}))
    with pytest.raises(CheckpointError, match="asks for code of its own choice"):
        Dinov2(code)
