"""`eval.py` against a reference that is not the training data: nothing of the checkpoint's data is looked for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image

from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.codecs.identity import Identity
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.programs.evaluate import evaluate
from flowanchor.programs.launch import prepare

_spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    _module.save_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
    content = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    content["flowanchor"]["config"]["data"] = {"_target_": "gone.Data", "channels": 1, "size": 8}
    torch.save(content, folder / "run" / "checkpoints" / "last.ckpt")  # its data is not on this machine
    images = DigitsDataModule(batch_size=8).images("train")
    for number in range(300):
        image = images[number]
        path = folder / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


def config(place, *overrides):
    prepare()
    settings = [f"checkpoint={place / 'run'}", "metric=random", f"metric.cache_dir={place / 'cache'}", "device=cpu"]
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        return compose("eval", [*settings, "num_samples=120", "batch_size=50", "nfe=[1,2]", *overrides])


def test_a_folder_without_the_data(place):
    report = evaluate(config(place, f"reference={place / 'images'}"), place / "folder")
    settings = report["settings"]
    assert settings["reference"]["name"] == "images" and settings["reference"]["n"] == 300
    assert settings["reference"]["missing"] == {} and len(settings["reference"]["hash"]) == 12
    assert (settings["metric"], settings["extractor"]["name"]) == ("FD-random", "flowanchor-random")
    assert report["floor"] is None
    for line in report["results"]:
        assert (line["floor"], line["floor_n"], line["fd_at_floor_n"]) == (None, None, None)
        assert line["fd"] > 0 and line["precision"] is not None and line["sfid"] is None
    assert (place / "folder" / "quality.png").stat().st_size > 5000


def test_statistics_alone(place):
    from flowanchor.metrics.evaluator import Evaluator
    from flowanchor.metrics.reference import open_reference
    from flowanchor.plugins.metrics.random_features import RandomMetric

    against = evaluate(config(place, f"reference={place / 'images'}"), place / "statistics")
    reference = Evaluator(
        RandomMetric(), None, reference=open_reference(str(place / "images"), (1, 8, 8))
    ).reference.features
    np.savez(place / "fid.npz", mu=reference.mean, sigma=reference.covariance)
    report = evaluate(config(place, f"reference={place / 'fid.npz'}"), place / "statistics")
    for line, same in zip(report["results"], against["results"], strict=True):
        assert line["fd"] == pytest.approx(same["fd"], rel=1e-9)
        assert line["inception_score"] == same["inception_score"]
        assert (line["kid"], line["precision"], line["recall"]) == (None, None, None)
    assert report["settings"]["reference"]["n"] is None
    assert set(report["settings"]["reference"]["missing"]) == {"kid", "precision", "recall"}
    assert json.loads((place / "statistics" / "metrics.json").read_text()) == report


def test_samples_of_another_size_than_the_reference(place):
    Image.new("L", (9, 8)).save(place / "large.png")
    (place / "other").mkdir()
    (place / "large.png").rename(place / "other" / "large.png")
    with pytest.raises(DataError, match="9 x 8 pixels and the samples have 8 x 8"):
        evaluate(config(place, f"reference={place / 'other'}"), place / "wrong")
    with pytest.raises(ConfigError, match="metric=small is trained on"):
        evaluate(config(place, "metric=small", f"reference={place / 'images'}"), place / "wrong")
    with pytest.raises(DataError, match="no reference .*gone.*reference=PATH"):
        evaluate(config(place, f"reference={place / 'gone'}"), place / "wrong")
    assert not (place / "wrong").exists()


def test_a_network_of_latents_needs_a_reference(place, monkeypatch):
    monkeypatch.setattr(Identity, "latent_channels", 1)
    with pytest.raises(ConfigError, match="trained on latents.*reference=FOLDER"):
        evaluate(config(place), place / "wrong")


def test_a_sample_that_is_not_finite_is_named(place, monkeypatch):
    decode = Identity.decode

    def broken(self, latents):
        images = decode(self, latents).clone()
        if len(images) == 20:  # the last batch of 120
            images[13, 0, 0, 0] = float("nan")
        return images

    monkeypatch.setattr(Identity, "decode", broken)
    with pytest.raises(DataError, match=r"Sample 113 \(seed 0, label 3, NFE 1\) is not finite"):
        evaluate(config(place, f"reference={place / 'images'}"), place / "nan")


def test_a_few_samples_of_inception_are_said_to_mislead(place, monkeypatch, capsys):
    from flowanchor.plugins.metrics.random_features import RandomMetric

    monkeypatch.setattr(RandomMetric, "biased_below", 10_000)
    evaluate(config(place, f"reference={place / 'images'}", "nfe=1"), place / "few")
    assert "of 120 samples is biased upwards" in " ".join(capsys.readouterr().out.split())
