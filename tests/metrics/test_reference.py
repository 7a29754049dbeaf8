"""Folders and .npz files as references, looked at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flowanchor.data.images import ArrayImages
from flowanchor.errors import ConfigError, DataError
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.reference import open_reference

SHAPE = (3, 8, 8)


def write_folder(folder, images):
    for number, image in enumerate(images):
        path = folder / f"class_{number % 3}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).squeeze().numpy()).save(path)
    return folder


def write_npz(path, images, **arrays):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    return path


def evaluator_of(sources, reference, **settings):
    return Evaluator(sources.PixelMetric(**settings), None, batch_size=32, reference=reference)


@pytest.fixture
def images(sources):
    return sources.noisy_images(120, seed=1)


@pytest.fixture
def samples(sources):
    return ArrayImages(sources.noisy_images(90, seed=2) // 2, None)


def test_a_folder_and_an_npz_of_the_same_images_score_the_same(tmp_path, sources, images, samples):
    folder = open_reference(str(write_folder(tmp_path / "images", images)), SHAPE)
    npz = open_reference(str(write_npz(tmp_path / "images.npz", images)), SHAPE)
    assert (folder.n, folder.name, npz.n, npz.name) == (120, "images", 120, "images.npz")
    np.savez_compressed(tmp_path / "small.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    compressed = open_reference(str(tmp_path / "small.npz"), SHAPE)
    scores = [evaluator_of(sources, reference).score(samples) for reference in (npz, compressed, folder)]
    assert scores[0] == scores[1]
    for name in ("fd", "sfid", "precision", "recall"):  # the kernel distance draws its subsets by position
        assert getattr(scores[2], name) == pytest.approx(getattr(scores[0], name), rel=1e-6)
    by_hand = sources.PixelExtractor()(images)[0].double()
    reference = evaluator_of(sources, npz).reference
    np.testing.assert_allclose(reference.features.mean, by_hand.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.features.covariance, torch.cov(by_hand.T), rtol=1e-5, atol=1e-9)


def test_statistics_alone(tmp_path, sources, images, samples):
    mean, _, corner = (layer.double().numpy() for layer in sources.PixelExtractor()(images))
    statistics = {"mu": mean.mean(0), "sigma": np.cov(mean.T)}
    np.savez(tmp_path / "fid.npz", **statistics)
    np.savez(tmp_path / "both.npz", **statistics, mu_s=corner.mean(0), sigma_s=np.cov(corner.T))
    expected = evaluator_of(sources, open_reference(str(write_npz(tmp_path / "all.npz", images)), SHAPE)).score(samples)
    alone = evaluator_of(sources, open_reference(str(tmp_path / "fid.npz"), SHAPE))
    scores = alone.score(samples)
    assert scores.fd == pytest.approx(expected.fd, rel=1e-5)
    assert scores.inception_score == expected.inception_score
    assert (scores.kid, scores.precision, scores.recall, scores.sfid) == (None, None, None, None)
    assert (
        set(alone.reference.missing("corner")) == {"kid", "precision", "recall", "sfid"} and alone.reference.n is None
    )
    spatial = evaluator_of(sources, open_reference(str(tmp_path / "both.npz"), SHAPE))
    assert spatial.score(samples).sfid == pytest.approx(expected.sfid, rel=1e-5)
    assert set(spatial.reference.missing("corner")) == {"kid", "precision", "recall"}


def test_statistics_beside_a_part_of_their_images(tmp_path, sources, images, samples):
    """As in ADM's batches: distances by the statistics of everything, precision and recall by the images."""
    mean, _, _ = (layer.double().numpy() for layer in sources.PixelExtractor()(images))
    path = write_npz(tmp_path / "adm.npz", images[:70], mu=mean.mean(0), sigma=np.cov(mean.T))
    found = evaluator_of(sources, open_reference(str(path), SHAPE)).score(samples)
    everything, part = (
        evaluator_of(sources, open_reference(str(write_npz(tmp_path / f"{len(x)}.npz", x)), SHAPE)).score(samples)
        for x in (images, images[:70])
    )
    assert found.fd == pytest.approx(everything.fd, rel=1e-5) and found.fd != pytest.approx(part.fd, rel=1e-3)
    assert (found.precision, found.recall, found.kid) == (part.precision, part.recall, part.kid)
    assert found.sfid is None


def test_statistics_of_another_extractor(tmp_path, sources, images, samples):
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "inception.npz", **statistics)
    with pytest.raises(DataError, match=r"2048 features.*has 12.*metric=inception"):
        _ = evaluator_of(sources, open_reference(str(tmp_path / "inception.npz"), SHAPE)).reference
    path = write_npz(tmp_path / "adm.npz", images, **statistics)  # its images serve
    plain = write_npz(tmp_path / "plain.npz", images)
    first, second = (evaluator_of(sources, open_reference(str(p), SHAPE)).score(samples) for p in (path, plain))
    assert first == second


def test_looked_at_once(tmp_path, sources, images, samples):
    folder = write_folder(tmp_path / "images", images)
    settings = {"cache_dir": str(tmp_path / "cache"), "feature_limit": 100}

    def scored(path):
        evaluator = evaluator_of(sources, open_reference(str(path), SHAPE, cache_dir=settings["cache_dir"]), **settings)
        return evaluator.score(samples), evaluator.metric.made.seen - len(samples)

    first, looked = scored(folder)
    assert looked == 120
    again, looked = scored(folder)
    assert looked == 0 and again == first
    copy = write_folder(tmp_path / "elsewhere", images)
    moved, looked = scored(copy)  # by content, not by place
    assert looked == 0 and moved == first
    write_folder(folder, images[:1] // 2)
    changed, looked = scored(folder)
    assert looked == 120 and changed.fd != first.fd
    for path in (tmp_path / "cache").glob("reference-*.npz"):
        path.write_bytes(path.read_bytes()[:1000])  # cut off
    assert scored(copy) == (first, 120)


def test_another_extractor_is_another_entry(tmp_path, sources, images):
    from flowanchor.plugins.metrics.random_features import RandomMetric

    reference = open_reference(str(write_npz(tmp_path / "images.npz", images)), SHAPE)
    found = [
        Evaluator(RandomMetric(seed=seed, cache_dir=str(tmp_path / "cache")), None, reference=reference).reference
        for seed in (0, 1, 0)
    ]
    assert len(list((tmp_path / "cache").glob("reference-*.npz"))) == 2
    np.testing.assert_array_equal(found[0].kept, found[2].kept)
    assert not np.array_equal(found[0].kept, found[1].kept)


def test_crop_and_gray(tmp_path, sources):
    large = sources.noisy_images(5, side=24)
    folder = write_folder(tmp_path / "large", large)
    with pytest.raises(DataError, match=r"24 x 24 pixels and the samples have 8 x 8.*reference_crop=true"):
        open_reference(str(folder), SHAPE)
    chunk = next(open_reference(str(folder), SHAPE, crop=True).chunks(5))
    assert chunk.shape == (5, 3, 8, 8) and chunk.float().mean().item() == pytest.approx(
        large.float().mean().item(), rel=0.02
    )
    gray = next(open_reference(str(folder), (1, 8, 8), crop=True).chunks(5))
    assert gray.shape == (5, 1, 8, 8)
    digests = {open_reference(str(folder), shape, crop=True).digest for shape in (SHAPE, (1, 8, 8))}
    assert len(digests) == 2


def test_references_that_cannot_be_used(tmp_path, sources, images):
    def refused(path, match, shape=SHAPE):
        with pytest.raises(DataError, match=match):
            open_reference(str(path), shape)

    refused(tmp_path / "gone", "no reference .*gone.*reference=PATH")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images in")
    np.savez(tmp_path / "other.npz", features=np.zeros(3))
    refused(tmp_path / "other.npz", "holds features:.*arr_0.*mu and sigma")
    (tmp_path / "text.npz").write_text("not a zip")
    refused(tmp_path / "text.npz", "cannot be read as")
    refused(write_npz(tmp_path / "small.npz", images), "8 x 8 pixels.*16 x 16", (3, 16, 16))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((4, 8, 8, 3)))
    refused(tmp_path / "float.npz", "must be uint8")
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    refused(tmp_path / "nan.npz", "mu or sigma that are not finite")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(4), sigma=np.eye(3))
    refused(tmp_path / "shape.npz", r"must be \[D\] and \[D, D\]")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))  # would have to be unpickled
    refused(tmp_path / "objects.npz", "cannot be read as")
    folder = write_folder(tmp_path / "broken", images[:4])
    damaged = sorted(folder.rglob("*.png"))[2]
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(DataError, match=f"{damaged.name} cannot be read"):
        _ = evaluator_of(sources, open_reference(str(folder), SHAPE)).reference


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_images(tmp_path, sources, images, samples, count):
    reference = open_reference(str(write_npz(tmp_path / "few.npz", images[:count])), SHAPE)
    with pytest.raises(ConfigError, match="at least"):
        evaluator_of(sources, reference).score(samples)


def test_a_cache_that_cannot_be_written(tmp_path, sources, images):
    (tmp_path / "file").write_text("in the way")
    reference = open_reference(str(write_npz(tmp_path / "images.npz", images)), SHAPE)
    with pytest.raises(ConfigError, match=r"metric\.cache_dir=FOLDER"):
        _ = evaluator_of(sources, reference, cache_dir=str(tmp_path / "file" / "cache")).reference


def test_a_user_without_a_home_has_a_cache(tmp_path, sources, images, monkeypatch):
    """As in a container that runs as a number: `~` means nothing there."""
    import pwd

    from flowanchor.metrics.storage import cache_folder

    def nobody(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    found = cache_folder("~/.cache/flowanchor")
    assert found.parent.parent.parent == tmp_path / "temporary" and found.parts[-2:] == (".cache", "flowanchor")
    assert cache_folder("/elsewhere").as_posix() == "/elsewhere"
    folder = write_folder(tmp_path / "images", images)
    settings = {"cache_dir": "~/.cache/flowanchor"}
    reference = open_reference(str(folder), SHAPE, **settings)
    _ = evaluator_of(sources, reference, **settings).reference
    assert len(list(found.glob("reference-*.npz"))) == len(list(found.glob("folder-*.json"))) == 1
