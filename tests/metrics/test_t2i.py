"""CLIP scores and distances against CLIP's own code and torch-fidelity's, and what a broken folder is answered with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.metrics.collected import Collected, Layers
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.reference import open_reference
from flowanchor.plugins.metrics.clip import Clip
from flowanchor.plugins.metrics.t2i import TextToImageMetric

PROMPTS = ["a seven", "the digit two", "b", "somebody wrote a nine by hand"]


@pytest.fixture(scope="module")
def clips():
    spec = importlib.util.spec_from_file_location("clips", Path(__file__).with_name("clips.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    return clips.write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_clip_score_is_a_stock_clips(clips, folder, images):
    prompts = [PROMPTS[i % 4] for i in range(12)]
    expected = 100 * clips.cosines(folder, images, prompts)
    assert expected.std() > 0.05
    metric = TextToImageMetric(str(folder), cache_dir=None)
    with pytest.warns(UserWarning, match="has 26 tokens and CLIP reads 20"):
        found = metric.alignment(images, prompts)
    assert found == pytest.approx(float(expected.sum()), rel=1e-4)


def test_a_long_prompt_is_read_at_its_end_mark(folder):
    """Cut without it, CLIP would look for the mark in vain and read the first token: every text would be the same."""
    clip = Clip(folder)
    with pytest.warns(UserWarning, match="the rest does not count"):
        tokens = clip.prepare(text=["a" * 50, "b" * 50])
    assert tokens["input_ids"].shape == (2, 20)
    assert (tokens["input_ids"][:, -1] == clip.config.text_config.eos_token_id).all()
    one, two = clip.get_text_features(**tokens)
    assert not torch.allclose(one, two, atol=1e-3)


def test_distances_are_of_clips_embeddings(clips, folder, images, tmp_path):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    reference = torch.randint(60, 200, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    (tmp_path / "real").mkdir()
    for number, image in enumerate(reference):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{number:02d}.png")
    metric = TextToImageMetric(str(folder), cache_dir=str(tmp_path / "cache"))
    evaluator = Evaluator(metric, None, batch_size=5, reference=open_reference(str(tmp_path / "real"), (3, 8, 8)))
    wanted = evaluator.wanted(12)
    found = Collected(wanted)
    for start in (0, 6):
        found.add(start, evaluator.look(images[start : start + 6], ["a seven"] * 6))
    scores = evaluator.score_collected(found)
    clip = Clip(folder)
    statistics = [fid_features_to_statistics(clip(part).double()) for part in (images, reference)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert evaluator.label == "FD-CLIP" and scores.fd == pytest.approx(expected, rel=1e-4)
    cosine = float(clips.cosines(folder, images, ["a seven"] * 12).mean())
    assert scores.clip_score == pytest.approx(max(100 * cosine, 0), rel=1e-4, abs=1e-5)
    assert scores.inception_score is None and scores.sfid is None and scores.kid is not None
    assert list((tmp_path / "cache").glob("reference-*.npz"))


def test_scores_of_parts_add_up(sources):
    metric = sources.PixelMetric()
    wanted = Evaluator(metric, None, reference=object()).wanted(30)  # type: ignore[arg-type]
    rows = np.random.default_rng(0).standard_normal((30, 4))
    whole, parts = Collected(wanted), [Collected(wanted), Collected(wanted)]
    for start, score in ((0, 300.0), (10, 250.0), (20, 90.0)):
        layers = Layers(rows[start : start + 10], rows[start : start + 10], alignment=score)
        whole.add(start, layers)
        parts[start == 10].add(start, layers)
    joined = Collected.from_state(wanted, parts[0].state())
    joined.merge(Collected.from_state(wanted, parts[1].state()))
    assert joined.alignment / joined.aligned == pytest.approx(64 / 3) == whole.alignment / whole.aligned
    assert Collected.from_state(wanted, Collected(wanted).state()).aligned == 0


def test_without_weights_there_is_one_sentence(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"needs the weights of CLIP: add metric\.clip=FOLDER"):
        TextToImageMetric(None)
    with pytest.raises(CheckpointError, match=r"There is no folder .*nowhere with CLIP"):
        TextToImageMetric(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read as CLIP with its processor"):
        TextToImageMetric(str(tmp_path / "empty"))
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in folder.iterdir():
        if file.name not in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"):
            (partial / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        TextToImageMetric(str(partial))
    with pytest.raises(ConfigError, match="There is no weights file"):
        TextToImageMetric(str(folder), weights=str(tmp_path / "none.pth")).extractor(None)
