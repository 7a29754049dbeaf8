"""Loaders without a trainer, their shards, and errors that come out of worker processes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowanchor.data.base import FlowDataModule
from flowanchor.data.images import ArrayImages, ImageBatches, ImageSet, interleave_classes, split_heldout
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Batch


class Gradient(FlowDataModule):
    name, channels, size, num_classes = "gradient", 1, 4, 3

    def load(self) -> dict[str, ImageSet]:
        images = torch.arange(10 * 16, dtype=torch.uint8).view(10, 1, 4, 4)
        labels = np.arange(10) % 3
        return {"train": ArrayImages(images, labels), "heldout": ArrayImages(images[:7], labels[:7])}


class Broken(Gradient):
    def load(self) -> dict[str, ImageSet]:
        class Unreadable(ArrayImages):
            def stack(self, indices):
                raise DataError("x.png cannot be read: remove it.")

        images = super().load()
        return {split: Unreadable(images[split].stack(range(len(images[split]))), None) for split in images}

    num_classes = 0


def test_batches_are_typed_and_scaled():
    batch = next(iter(Gradient(batch_size=4).train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.x1.shape == (4, 1, 4, 4) and batch.x1.dtype == torch.float32
    assert batch.cond.dtype == torch.int64 and batch.cond.shape == (4,)
    assert batch.x1.min() >= -1 and batch.x1.max() <= 1


def test_unlabelled_batches_have_no_condition():
    data = Gradient(batch_size=4)
    data.num_classes = 0
    assert next(iter(data.train_dataloader())).cond is None


def test_validation_is_the_heldout_set_in_order():
    data = Gradient(batch_size=3)
    batches = list(data.val_dataloader())
    assert [len(batch.cond) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.cond for batch in batches]).tolist() == data.images("heldout").labels.tolist()


def test_ranks_split_validation(monkeypatch):
    seen = []
    for rank in range(2):
        data = Gradient(batch_size=2)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, accumulate_grad_batches=1)
        seen.append([batch.x1[:, 0, 0, 0] for batch in data.val_dataloader()])
    whole = torch.cat([batch.x1[:, 0, 0, 0] for batch in Gradient(batch_size=4).val_dataloader()])
    joint = torch.cat([torch.cat(pair) for pair in zip(*seen, strict=True)])
    assert torch.equal(joint[:7], whole)
    assert len(joint) == 8  # filled up to equal shares


def test_mirror_doubles_the_set_without_chance():
    images = ArrayImages(torch.arange(2 * 16, dtype=torch.uint8).view(2, 1, 4, 4), np.array([0, 1]))
    mirrored = ImageBatches(images, labelled=True, mirror=True)
    assert len(mirrored) == 4
    batch = mirrored.__getitems__([0, 2, 1, 3])
    assert torch.equal(batch.x1[1], batch.x1[0].flip(-1)) and torch.equal(batch.x1[3], batch.x1[2].flip(-1))
    assert not torch.equal(batch.x1[0], batch.x1[1])
    assert batch.cond.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_stays_one_sentence(workers):
    with pytest.raises(DataError) as caught:
        next(iter(Broken(batch_size=2, num_workers=workers).train_dataloader()))
    assert str(caught.value) == "x.png cannot be read: remove it."


def test_setup_refuses_a_batch_larger_than_the_data():
    with pytest.raises(DataError, match=r"data\.batch_size=10 or less"):
        Gradient(batch_size=11).setup("fit")
    Gradient(batch_size=11, drop_last=False).setup("fit")


def test_unknown_split():
    with pytest.raises(ConfigError, match="'test'.*train, heldout"):
        Gradient(batch_size=2).images("test")


def test_every_prefix_is_balanced():
    labels = np.repeat([0, 1, 2], [5, 3, 4])
    order = labels[interleave_classes(labels)]
    for n in range(1, 10):
        counts = np.bincount(order[:n], minlength=3)
        assert counts.max() - counts.min() <= 1


def test_split_is_stratified_disjoint_and_seeded():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    train, heldout = split_heldout(labels, 200, 7, seed=1)
    assert sorted([*train, *heldout]) == list(range(200))
    assert np.bincount(labels[heldout]).tolist() == [7] * 4
    assert np.array_equal(heldout, split_heldout(labels, 200, 7, seed=1)[1])
    assert not np.array_equal(heldout, split_heldout(labels, 200, 7, seed=2)[1])


def test_digest_is_of_the_content():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    labels = np.arange(3)
    same, other = ArrayImages(images.clone(), labels.copy()), images.clone()
    other[1, 0, 0, 0] = 1
    assert ArrayImages(images, labels).digest() == same.digest()
    assert ArrayImages(other, labels).digest() != same.digest()
    assert ArrayImages(images, labels[::-1].copy()).digest() != same.digest()
    assert same.subset([0, 1]).digest() != same.subset([1, 0]).digest()
