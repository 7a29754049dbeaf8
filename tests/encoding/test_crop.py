"""The centre crop equals the released one's result, written down by hand for sizes that take each of its branches."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flowanchor.encoding.crop import center_crop


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8))


def test_a_square_of_the_size_is_left_alone():
    image = picture(16, 16)
    assert np.array_equal(np.asarray(center_crop(image, 16)), np.asarray(image))


def test_the_middle_is_cut():
    image = picture(21, 16)  # an odd rest: the smaller part on the left
    assert np.array_equal(np.asarray(center_crop(image, 16)), np.asarray(image)[:, 2:18])


def test_twice_the_size_is_averaged():
    image = picture(32, 32)
    pixels = np.asarray(image).astype(float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(image, 16)) - pixels).max() <= 1  # Pillow rounds rows, then columns


@pytest.mark.parametrize("width, height", [(33, 70), (130, 65), (10, 12), (300, 31)])
def test_any_shape_becomes_the_square(width, height):
    assert center_crop(picture(width, height), 16).size == (16, 16)


def test_below_twice_the_size_it_is_resized_at_once():
    image = picture(31, 31)
    once = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(center_crop(image, 16)), np.asarray(once))
