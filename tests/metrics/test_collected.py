"""What is collected does not grow with the number of images, and parts are as good as the whole."""

from __future__ import annotations

import tracemalloc
import weakref

import numpy as np
import pytest
import torch

from flowanchor.metrics.collected import Collected, Layers, Wanted, join_ranges, remaining, share
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.reference import TrainSplit

CHUNK = 50


def layers(n=700, seed=0):
    generator = np.random.default_rng(seed)
    return Layers(*(generator.standard_normal((n, size)).astype(np.float32) for size in (6, 5, 4)))


def rows(found, start, stop):
    return Layers(found.features[start:stop], found.logits[start:stop], found.spatial[start:stop])


def collect(wanted, found, ranges, batch=64):
    collected = Collected(wanted)
    for start, stop in ranges:
        for first in range(start, stop, batch):
            collected.add(first, rows(found, first, min(first + batch, stop)))
    return collected


@pytest.mark.parametrize("through_state", [False, True])
def test_parts_in_any_order_are_the_whole(through_state):
    wanted, found = Wanted(700, splits=7, prefix=333, feature_limit=90), layers()
    whole = collect(wanted, found, [(0, 700)])
    parts = [collect(wanted, found, ranges) for ranges in ([(500, 700)], [(0, 100), (300, 500)], [(100, 300)])]
    merged = Collected(wanted)
    for part in parts:
        merged.merge(Collected.from_state(wanted, part.state()) if through_state else part)
    assert merged.n == 700 and merged.ranges == [(0, 700)]
    np.testing.assert_array_equal(merged.kept_features(), found.features[wanted.kept()])
    for name, expected in (
        ("features", found.features), ("spatial", found.spatial), ("prefix", found.features[:333])
    ):  # fmt: skip
        for collected in (whole, merged):
            gaussian = getattr(collected, name).gaussian()
            np.testing.assert_allclose(gaussian.mean, expected.mean(0, dtype=np.float64), rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(gaussian.covariance, np.cov(expected.T.astype(float)), rtol=1e-10, atol=1e-12)
    assert merged.predictions.score() == pytest.approx(whole.predictions.score(), rel=1e-12)


def test_no_image_counts_twice():
    wanted, found = Wanted(700), layers()
    part = collect(wanted, found, [(0, 200)])
    with pytest.raises(ValueError, match="images 150 ... 199"):
        part.merge(collect(wanted, found, [(150, 300)]))


def test_ranges():
    assert join_ranges([(5, 9), (0, 2), (2, 5), (12, 12)]) == [(0, 9)]
    assert remaining(10, []) == [(0, 10)] and remaining(10, [(0, 10)]) == []
    assert remaining(10, [(2, 4), (7, 10)]) == [(0, 2), (4, 7)]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_whole_batches_and_together_everything(processes):
    todo = [(0, 100), (150, 333)]
    shares = [share(todo, 25, process, processes) for process in range(processes)]
    assert join_ranges([r for ranges in shares for r in ranges]) == todo  # raises where two overlap
    edges = {edge for ranges in shares for pair in ranges for edge in pair}
    assert all(edge % 25 == 0 for edge in edges - {333})
    sizes = [sum(stop - start for start, stop in ranges) for ranges in shares]
    assert max(sizes) - min(sizes) <= 25 + 17


def evaluation(evaluator, sources, count):
    """Peak of Python's allocations, bytes of images alive at once, and bytes collected, while `count` images pass."""
    living: list[int] = []
    alive: weakref.WeakSet = weakref.WeakSet()

    def chunks():
        for start in range(0, count, CHUNK):
            chunk = sources.noisy_images(CHUNK, seed=start)
            alive.add(chunk)
            living.append(sum(c.numel() for c in alive))
            yield chunk

    tracemalloc.start()
    found = evaluator.collect(chunks(), evaluator.wanted(count, prefix=100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.n == count
    return peak, max(living), found.size()


def test_memory_does_not_grow_with_the_number_of_images(sources, digits):
    evaluator = Evaluator(sources.PixelMetric(feature_limit=150), None, reference=TrainSplit(digits))
    evaluation(evaluator, sources, 200)
    peak, living, held = evaluation(evaluator, sources, 200)
    more_peak, more_living, more_held = evaluation(evaluator, sources, 2000)
    assert living == more_living <= 2 * CHUNK * 3 * 64
    splits = 10 - 4  # 200 images are enough for 4 parts of the inception score: 3 classes and two sums more each
    assert more_held - held <= (2000 - 200) + splits * (3 + 2) * 8  # a byte per image: its part of the inception score
    assert more_peak < peak + 30_000  # the choice of the kept features, made once: 8 bytes per image and index


def test_kept_images_are_the_same_for_the_same_number():
    kept = Wanted(2000, feature_limit=150).kept()
    assert len(set(kept.tolist())) == 150 and (np.diff(kept) > 0).all()
    assert np.array_equal(kept, Wanted(2000, feature_limit=150).kept())
    assert torch.equal(torch.from_numpy(Wanted(100, feature_limit=150).kept()), torch.arange(100))
