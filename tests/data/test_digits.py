from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from flowanchor.errors import ConfigError
from flowanchor.plugins.data.digits import DigitsDataModule


@pytest.fixture(scope="module")
def data():
    return DigitsDataModule(batch_size=128, repeat=10)


def test_split_sizes_and_balance(data):
    train, heldout = data.images("train"), data.images("heldout")
    assert (len(train), len(heldout)) == (1297, 500)
    assert np.bincount(heldout.labels).tolist() == [50] * 10
    assert heldout.labels[:20].tolist() == [*range(10)] * 2


def test_splits_are_the_whole_set_once(data):
    whole = load_digits()
    levels = np.round(whole.images * 255 / 16).astype(np.uint8)
    expected = sorted((bytes(image), int(label)) for image, label in zip(levels, whole.target, strict=True))
    found = [
        (bytes(images[i].numpy()), int(images.labels[i]))
        for images in (data.images("train"), data.images("heldout"))
        for i in range(len(images))
    ]
    assert sorted(found) == expected


def test_split_does_not_depend_on_the_seed_of_the_run(data):
    assert DigitsDataModule(batch_size=128, seed=7).images("heldout").digest() == data.images("heldout").digest()


def test_grey_levels_span_the_range(data):
    x1 = next(iter(data.train_dataloader())).x1
    assert x1.shape == (128, 1, 8, 8) and (x1.min(), x1.max()) == (-1, 1)
    levels = (x1 + 1) * 8  # 0..16
    assert (levels - levels.round()).abs().max() < 0.032  # half a byte


def test_epoch_is_ten_passes(data):
    assert len(data.train_dataloader()) == 12970 // 128


def test_without_labels(data):
    unlabelled = DigitsDataModule(batch_size=8, num_classes=0)
    assert next(iter(unlabelled.train_dataloader())).cond is None
    assert unlabelled.images("train").labels is not None  # the metric still knows them


def test_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"data\.size=8"):
        DigitsDataModule(batch_size=8, size=16)
