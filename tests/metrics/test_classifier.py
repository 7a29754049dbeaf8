from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from flowanchor.data.images import ArrayImages
from flowanchor.errors import ConfigError
from flowanchor.plugins.metrics.classifier import (
    FEATURES,
    ClassifierSpec,
    SmallClassifier,
    cached_classifier,
    train_classifier,
)

SPEC = ClassifierSpec(channels=1, size=8, num_classes=10, steps=3, batch_size=16)


@pytest.fixture
def splits(digits):
    return digits.images("train").subset(range(60)), digits.images("heldout").subset(range(40))


def test_the_classifier_of_digits_recognises_digits(small_metric, digits):
    trained = small_metric.classifier(digits)
    assert trained.heldout_accuracy >= 0.97
    assert not trained.model.training and not any(p.requires_grad for p in trained.model.parameters())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 28), (3, 33), (1, 64)])
def test_any_size_of_image(channels, size):
    model = SmallClassifier(replace(SPEC, channels=channels, size=size))
    features, logits = model(torch.zeros(2, channels, size, size, dtype=torch.uint8))
    assert features.shape == (2, FEATURES) and logits.shape == (2, 10)


def test_second_time_comes_from_the_cache(tmp_path, splits, monkeypatch):
    first = cached_classifier(*splits, SPEC, tmp_path, "digits")
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".lock"}
    assert json.loads(first.path.with_suffix(".json").read_text())["data"] == "digits"
    monkeypatch.setattr("flowanchor.plugins.metrics.classifier.train_classifier", None)  # calling it would fail
    second = cached_classifier(*splits, SPEC, tmp_path, "digits")
    assert first.heldout_accuracy == second.heldout_accuracy
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_key_follows_data_and_settings(tmp_path, splits):
    train, heldout = splits
    changed = train.stack(range(len(train))).clone()
    changed[0, 0, 0, 0] ^= 1
    keys = {
        cached_classifier(train, heldout, SPEC, tmp_path, "a").key,
        cached_classifier(train, heldout, SPEC, tmp_path, "b").key,  # a name is not content
        cached_classifier(train, heldout, replace(SPEC, seed=1), tmp_path, "a").key,
        cached_classifier(ArrayImages(changed, train.labels), heldout, SPEC, tmp_path, "a").key,
    }
    assert len(keys) == 3


def test_training_is_reproducible_and_leaves_the_random_state(splits):
    state = torch.get_rng_state()
    first = train_classifier(splits[0], SPEC)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = train_classifier(splits[0], SPEC)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unwritable_cache_says_what_to_type(tmp_path, splits):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"metric\.cache_dir=FOLDER"):
        cached_classifier(*splits, SPEC, tmp_path / "file" / "cache", "digits")
