from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data.image_folder import FolderImages, ImageFolderDataModule


def paint(path, width=20, height=10, color=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = color
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    for label, count in (("cat", 10), ("dog", 20)):
        for i in range(count):
            paint(tmp_path / label / f"{i:02d}.png", color=(10 * i, 0, 255 if label == "dog" else 0))
    return tmp_path


def module(root, **settings):
    return ImageFolderDataModule(
        **{"root": root and str(root), "size": 8, "num_classes": 2, "batch_size": 4, **settings}
    )


def test_classes_are_the_subfolders(folder):
    data = module(folder)
    train, heldout = data.images("train"), data.images("heldout")
    assert data.class_names == ("cat", "dog") and data.name == folder.name
    assert np.bincount(train.labels).tolist() == [9, 18] and np.bincount(heldout.labels).tolist() == [1, 2]
    assert train[0].shape == (3, 8, 8) and train[0].dtype == torch.uint8
    for images in (train, heldout):
        blue = [int(images[i][2].max()) for i in range(len(images))]
        assert [value > 128 for value in blue] == [label == 1 for label in images.labels]


def test_crop_is_centred(tmp_path):
    files = [tmp_path / "a" / "wide.png", tmp_path / "a" / "wider.png"]
    for path, width in zip(files, (20, 60), strict=True):
        paint(path, width=width)  # an edge in the middle
    images = FolderImages(files, None, tmp_path, channels=3, size=8)
    for i in range(2):
        assert images[i][0, :, :3].max() < 30 and images[i][0, :, 5:].min() > 170


def test_gray(folder):
    assert module(folder, channels=1).images("train")[0].shape == (1, 8, 8)


def test_mirror_is_a_second_half_of_the_set(folder):
    data, plain = module(folder, mirror=True, batch_size=54), module(folder)
    batch = next(iter(data.train_dataloader()))
    assert len(data.train_dataloader()) == 1 and len(batch.x1) == 2 * len(plain.images("train"))
    rows = {bytes(x.numpy()) for x in batch.x1}
    assert all(bytes(x.flip(-1).contiguous().numpy()) in rows for x in batch.x1)
    assert sum(len(b.x1) for b in data.val_dataloader()) == 3  # held-out images are not mirrored


def test_unlabelled(folder):
    data = module(folder, labelled=False, num_classes=0)
    assert len(data.images("train")) == 27 and len(data.images("heldout")) == 3
    assert data.images("train").labels is None
    assert next(iter(data.train_dataloader())).cond is None


def test_split_is_fixed(folder):
    assert module(folder, seed=1).images("heldout").digest() == module(folder, seed=2).images("heldout").digest()
    assert module(folder, size=4).images("heldout").digest() != module(folder).images("heldout").digest()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(folder, workers):
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"no image")
    data = module(folder, num_workers=workers, batch_size=27)
    with pytest.raises(DataError, match=r"cat/\d\d\.png cannot be read as an image.*remove it") as caught:
        next(iter(data.train_dataloader()))
    assert "Traceback" not in str(caught.value)


def test_bad_images_are_replaced_up_to_a_limit(folder):
    """By the next one of their class, of their split: the labels stay, nothing that is held out is trained on."""
    data = module(folder, max_bad=2)
    train = data.images("train")
    files = np.array([path.name for path in train.images._images.files])[train.images._indices]
    cats = np.flatnonzero(train.labels == 0)
    first, second = cats[2], cats[-1]
    for index in (first, second):
        (folder / "cat" / files[index]).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"cat/.*left out \(1 so far, at most 2\), another one of its class takes"):
        replaced = train[int(first)]
    assert torch.equal(replaced, train[int(cats[3])]) and torch.equal(train[int(second)], train[int(cats[0])])
    assert len(train.stack(range(len(train)))) == 27, "no more than these two are counted, once each"
    strict = module(folder, max_bad=1, num_workers=1, batch_size=27)
    with pytest.raises(DataError, match=r"cat/.*cannot be read .*up to 2 .* by data\.max_bad=2 \(now 1[;)]"):
        next(iter(strict.train_dataloader()))


def test_a_class_without_any_readable_image_stops_it(folder):
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"no image")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="No image of the class of image 0 can be read"):
        module(folder, max_bad=20).images("train")[0]


def test_truncated_image_is_named(folder):
    path = folder / "cat" / "00.png"
    path.write_bytes(path.read_bytes()[:50])
    images = module(folder).images("train")
    with pytest.raises(DataError, match="00.png"):
        images.stack(range(len(images)))
        module(folder).images("heldout").stack([0])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda root: None, {}, "neither images nor class subfolders.*data.labelled=false"),
        (lambda root: paint(root / "a.png"), {}, "images but no class subfolders.*data.labelled=false"),
        (lambda root: (root / "cat").mkdir(), {}, "class folder without images"),
        (lambda root: None, {"labelled": False, "num_classes": 0}, "no images in.*data.root=FOLDER"),
        (lambda root: paint(root / "cat" / "a.png"), {}, "has 1 class folders.*data.num_classes=1"),
        (lambda root: paint(root / "cat" / "a.png"), {"num_classes": 1}, "one image per class"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, settings, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        module(tmp_path, **settings).setup("fit")


def test_missing_folder(tmp_path):
    for settings in ({}, {"labelled": False, "num_classes": 0}):
        with pytest.raises(DataError, match="no folder .*data.root=FOLDER"):
            module(tmp_path / "gone", **settings).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": None}, "data.root=FOLDER"),
        ({"channels": 4}, "data.channels=1 or 3"),
        ({"labelled": False}, "data.num_classes=0"),
        ({"heldout": 1.0}, "data.heldout=0.1"),
        ({"max_bad": -1}, "data.max_bad=-1"),
    ],
)
def test_settings_that_contradict(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        module(**{"root": tmp_path, **settings})


def test_a_picture_behind_a_link_is_there_once_and_under_its_own_class(tmp_path):
    """Otherwise one picture would have two labels, or be trained on and held out."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / name / f"{name}{index}.png")
    (tmp_path / "b" / "more").symlink_to("../a")
    (tmp_path / "a" / "again.png").symlink_to("../b/b0.png")
    data = ImageFolderDataModule(root=str(tmp_path), num_classes=2, size=4, batch_size=2)
    unused = Counter()
    files, labels = data._labelled_files(unused)
    assert [path.name for path in files] == ["a0.png", "a1.png", "a2.png", "b0.png", "b1.png", "b2.png"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and unused["links to others of them"] == 5
    assert len(data._unlabelled_files(Counter())) == 6
