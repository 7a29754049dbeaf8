from __future__ import annotations

import numpy as np
import pytest
import torch

from flowanchor.generation.sample_file import SampleFile


def chunks(count, size=50, side=4):
    for start in range(0, count, size):
        values = (torch.arange(start, min(start + size, count)) % 256).to(torch.uint8)
        yield values.view(-1, 1, 1, 1).repeat(1, side, side + 1, 3)


def check(path, labels):
    with np.load(path, allow_pickle=False) as content:
        assert content["images"].shape == (120, 4, 5, 3) and content["images"].dtype == np.uint8
        assert content["images"][:, 0, 0, 0].tolist() == list(range(120))
        assert content["labels"].tolist() == ([-1] * 120 if labels is None else labels.tolist())
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("labels", [None, np.arange(120) % 7])
def test_images_and_labels(tmp_path, labels):
    path = tmp_path / "samples" / "nfe1.npz"
    with SampleFile(path, 120, labels) as file:
        for chunk in chunks(120):
            file.add(chunk)
    check(path, labels)


def test_several_writers_and_one_that_goes_on(tmp_path):
    path = tmp_path / "samples" / "nfe1.npz"
    parts = dict(zip((0, 50, 100), chunks(120), strict=True))
    first, second = SampleFile(path, 120, None), SampleFile(path, 120, None)
    second.write(100, parts[100])
    first.write(0, parts[0])
    first.flush()
    second.close()
    again = SampleFile(path, 120, None)
    again.write(50, parts[50])
    first.close()
    again.finish()
    check(path, None)


def test_interrupted_it_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), SampleFile(tmp_path / "nfe1.npz", 120, None) as file:
        file.add(next(chunks(120)))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
