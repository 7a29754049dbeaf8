from __future__ import annotations

import gc
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flowanchor.metrics.sample_file import SampleFile
from flowanchor.metrics.stream import StreamedImages

CHUNK = 50


def chunks(count, side=4, alive=None, peak=None):
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        chunk = (torch.arange(start, start + size) % 256).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, side, side + 1, 3)
        if alive is not None:
            alive.add(chunk)
            peak.append(len(alive))
        yield chunk


def test_images_in_order_whatever_the_batches():
    images = StreamedImages(lambda: chunks(120), 120)
    assert images[0].shape == (3, 4, 5)  # as torch-fidelity does: item 0 once more, before everything
    batches = list(DataLoader(images, batch_size=32))
    assert [len(batch) for batch in batches] == [32, 32, 32, 24]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(120))


def test_every_chunk_is_reported_once():
    seen = []
    images = StreamedImages(lambda: chunks(120), 120, on_chunk=lambda chunk: seen.append(len(chunk)))
    _ = images[0], images[0], [images[i] for i in range(120)]
    assert seen == [50, 50, 20] and images.seconds > 0


def test_going_back_and_coming_short_are_defects():
    images = StreamedImages(lambda: chunks(100), 150)
    _ = images[60]
    with pytest.raises(RuntimeError, match="in order"):
        images[10]
    with pytest.raises(RuntimeError, match="150 images were announced, 100"):
        images[120]


@pytest.mark.parametrize("count", [200, 2000])
def test_one_chunk_is_alive_at_a_time(count):
    alive, peak = weakref.WeakSet(), []
    images = StreamedImages(lambda: chunks(count, alive=alive, peak=peak), count)
    for _ in DataLoader(images, batch_size=25):
        pass
    gc.collect()
    assert len(peak) == count // CHUNK
    assert max(peak) <= 2  # the new one, and the one that the generator itself still names
    assert len(alive) == 1


def evaluation_peak(evaluator, count):
    """Peak of Python's and torch's allocations for images while `count` of them pass through the extractor."""
    living: list[int] = []
    alive: weakref.WeakSet = weakref.WeakSet()

    def digits_like():
        generator = torch.Generator().manual_seed(0)
        for _ in range(0, count, CHUNK):
            chunk = torch.randint(0, 256, (CHUNK, 8, 8, 1), dtype=torch.uint8, generator=generator)
            alive.add(chunk)
            living.append(sum(c.numel() for c in alive))
            yield chunk

    tracemalloc.start()
    found = evaluator.features(StreamedImages(digits_like, count))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == count
    return peak, max(living)


def test_memory_of_an_evaluation_does_not_grow_with_the_number_of_images(evaluator):
    evaluation_peak(evaluator, 200)
    small, small_bytes = evaluation_peak(evaluator, 200)
    large, large_bytes = evaluation_peak(evaluator, 2000)
    assert large_bytes == small_bytes <= 2 * CHUNK * 64
    assert large < small + 300_000  # not even objects per image


@pytest.mark.parametrize("labels", [None, np.arange(120) % 7])
def test_sample_file(tmp_path, labels):
    path = tmp_path / "samples" / "nfe1.npz"
    with SampleFile(path, 120, labels) as file:
        for chunk in chunks(120):
            file.add(chunk)
    with np.load(path, allow_pickle=False) as content:
        assert content["images"].shape == (120, 4, 5, 3) and content["images"].dtype == np.uint8
        assert content["images"][:, 0, 0, 0].tolist() == list(range(120))
        assert content["labels"].tolist() == ([-1] * 120 if labels is None else labels.tolist())
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_sample_file_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), SampleFile(tmp_path / "nfe1.npz", 120, None) as file:
        file.add(next(chunks(120)))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
