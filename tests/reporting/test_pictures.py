"""PNG files that say where they come from, and films."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flowanchor.reporting.grids import labelled_grid
from flowanchor.reporting.pictures import factor, file_name, picture, read_facts, save_film, save_png


def image(height=8, width=8, channels=1):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    "size, times", [((8, 8), 32), ((28, 28), 9), ((32, 32), 8), ((127, 4), 2), ((128, 1), 1), ((512, 512), 1)]
)
def test_small_images_are_enlarged_by_whole_factors(size, times):
    assert factor(*size) == times
    assert factor(*size, scale=3) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_holds_the_pixels_and_the_facts(tmp_path, channels):
    pixels, facts = image(8, 6, channels), {"seed": 1, "class": "Größe", "checkpoint": "abc"}
    save_png(tmp_path / "new" / "a.png", pixels, facts)
    assert read_facts(tmp_path / "new" / "a.png") == facts
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert file.size == (6 * 32, 8 * 32) and file.mode == ("L" if channels == 1 else "RGB")
        assert file.info["Software"].startswith("flowanchor ")
        shown = np.asarray(file).reshape(8, 32, 6, 32, channels)
    assert (shown == pixels[:, None, :, None]).all()
    save_png(tmp_path / "b.png", pixels, {}, scale=1)
    with Image.open(tmp_path / "b.png") as file:
        assert np.array_equal(np.asarray(file).reshape(pixels.shape), pixels)
    assert picture(pixels, 2).size == (12, 16)


def test_names_of_files():
    assert file_name(3, 100, "Ankle boot") == "00003_Ankle-boot.png"
    assert file_name(3, 100, "T-shirt/top ../..") == "00003_T-shirt-top.png"
    assert file_name(0, 1_000_000, None) == "000000.png"
    assert file_name(0, 1, "x" * 500) == f"00000_{'x' * 60}.png"
    assert file_name(0, 1, "../\\..") == "00000.png"


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_film_has_every_frame_and_rests_on_the_last(tmp_path, kind):
    frames = [labelled_grid(np.full((4, 8, 8, 1), level, dtype=np.uint8), title="a title") for level in (0, 90, 255)]
    save_film(tmp_path / f"way.{kind}", frames)
    with Image.open(tmp_path / f"way.{kind}") as film:
        assert film.n_frames == 3 and film.info.get("loop", 0) == 0
        durations, middle = [], []
        for number in range(3):
            film.seek(number)
            film.load()
            durations.append(film.info["duration"])
            middle.append(np.asarray(film.convert("RGB"))[-20, 20].tolist())
    assert durations[-1] > durations[1] and middle == [[0] * 3, [90] * 3, [255] * 3]


def test_a_title_stands_above_and_never_on_the_images():
    images = np.zeros((4, 8, 8, 1), dtype=np.uint8)
    plain, titled = labelled_grid(images), labelled_grid(images, title="digits_facm: consistency, 2 steps, seed 0")
    assert titled.height > plain.height and titled.width >= plain.width
    below = titled.crop((0, titled.height - plain.height, plain.width, titled.height))
    assert np.array_equal(np.asarray(below), np.asarray(plain))
