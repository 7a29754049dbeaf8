"""The reader of IDX files, on files written here after the format's definition."""

from __future__ import annotations

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from flowanchor.checkpoints import load_model
from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data import fashion_mnist
from flowanchor.plugins.data.fashion_mnist import FashionMNISTDataModule


def write(folder, zipped=False, train=30, heldout=20, side=28):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    kept = {}
    for part, count in (("train", train), ("t10k", heldout)):
        images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        labels = np.repeat(np.arange(10, dtype=np.uint8), count // 10)
        for name, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            raw = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)
        kept[part] = (images, labels)
    return kept


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_reads_plain_and_gzipped_files(tmp_path, zipped, layout):
    kept = write(tmp_path / layout, zipped)
    data = FashionMNISTDataModule(str(tmp_path), batch_size=4)
    train = data.images("train")
    assert np.array_equal(torch.stack([train[i] for i in range(30)])[:, 0].numpy(), kept["train"][0])
    assert train.labels.tolist() == kept["train"][1].tolist()
    heldout = data.images("heldout")
    assert len(heldout) == 20 and heldout.labels[:10].tolist() == list(range(10))
    assert np.array_equal(heldout[1][0].numpy(), kept["t10k"][0][2])  # the first image of class 1


def test_border(tmp_path):
    write(tmp_path)
    image = FashionMNISTDataModule(str(tmp_path), size=32, batch_size=4).images("train")[0]
    assert image.shape == (1, 32, 32) and image[0, :2].sum() == 0 and image[0, 2:-2, 2:-2].sum() > 0


def test_missing_files_say_what_to_type(tmp_path):
    with pytest.raises(DataError, match=r"data\.root=FOLDER .*data\.download=true"):
        FashionMNISTDataModule(str(tmp_path), batch_size=4).setup("fit")


def test_without_a_root_the_first_usual_folder_that_has_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = tmp_path / "share" / "fashion-mnist"
    monkeypatch.setattr(fashion_mnist, "PLACES", (fashion_mnist.DOWNLOADS, str(packaged)))
    assert str(FashionMNISTDataModule(batch_size=4).root) == fashion_mnist.DOWNLOADS
    write(packaged, zipped=True)
    assert len(FashionMNISTDataModule(batch_size=4).images("train")) == 30
    write(tmp_path / fashion_mnist.DOWNLOADS, train=10)
    assert len(FashionMNISTDataModule(batch_size=4).images("train")) == 10


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    import torchvision

    asked = []

    def offline(root, download):
        asked.append((root, download))
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    with pytest.raises(DataError, match="is not in"):
        FashionMNISTDataModule(str(tmp_path), batch_size=4).setup("fit")
    assert not asked
    with pytest.raises(DataError, match="no network.*put its four IDX files there"):
        FashionMNISTDataModule(str(tmp_path), batch_size=4, download=True).prepare_data()
    assert asked == [(str(tmp_path), True)]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "not gzip"])
def test_damaged_files(tmp_path, damage):
    write(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        path.write_bytes(b"<html>not found</html>")
    else:
        path.unlink()
        path.with_suffix(".gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged or is no IDX file.*data.root=FOLDER"):
        FashionMNISTDataModule(str(tmp_path), batch_size=4).images("train")


def test_images_of_another_size(tmp_path):
    write(tmp_path, side=20)
    with pytest.raises(DataError, match="28 x 28"):
        FashionMNISTDataModule(str(tmp_path), batch_size=4).images("train")
    with pytest.raises(ConfigError, match=r"data\.size=28"):
        FashionMNISTDataModule(str(tmp_path), size=64, batch_size=4)


def test_the_recipes_train(monkeypatch, tmp_path):
    from flowanchor.programs.train import main

    write(tmp_path / "images")
    small = [f"data.root={tmp_path / 'images'}", "backbone.hidden_size=16", "backbone.depth=1",
             "backbone.num_heads=2", "~callbacks.sample_grid", "logger=none", "data.batch_size=8",
             "trainer.max_steps=1", "trainer.limit_val_batches=0"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for recipe in (["fashion_teacher"], ["fashion_facm", "teacher.checkpoint=outputs/train/fashion_teacher"]):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["src/train.py", f"experiment={recipe[0]}", *recipe[1:], *small])
        main()
    student = load_model(tmp_path / "outputs" / "train" / "fashion_facm")
    assert student.step == 1 and student.backbone.sample_shape == (1, 28, 28)
