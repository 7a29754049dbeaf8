"""The nearest training picture, and the grids that show it."""

from __future__ import annotations

import numpy as np

import emoji_pictures


def test_the_nearest_is_found_plain_or_mirrored():
    draw = np.random.default_rng(0)
    training = draw.integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    samples = np.concatenate(
        [training[2:3], training[5:6, :, ::-1], draw.integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)]
    )
    found, distances = emoji_pictures.nearest(samples, training)
    candidates = [*training, *(picture[:, ::-1] for picture in training)]
    for sample, picture, distance in zip(samples, found, distances, strict=True):
        every = [np.sqrt(np.mean((sample / 255 - candidate / 255) ** 2)) for candidate in candidates]
        assert np.isclose(distance, min(every), atol=1e-6)
        assert np.array_equal(picture, candidates[int(np.argmin(every))])
    assert np.array_equal(found[1], samples[1]) and distances[1] < 1e-6 < distances[2:].min()


def test_each_grid_has_the_rows_of_every_class():
    count = 2 * emoji_pictures.ROWS * emoji_pictures.COLUMNS
    grid = np.full((count, 16, 16, 3), 255, dtype=np.uint8)
    grid[-1] = (255, 0, 0)
    shown = np.asarray(emoji_pictures.picture(["left", "right"], [grid, grid], ("face", "heart")).convert("RGB"))
    red = (shown == (255, 0, 0)).all(-1)
    assert red.sum() == 2 * 48**2  # once in each grid, three times as large
