from __future__ import annotations

import torch

from flowanchor.base.pixels import from_uint8, to_uint8
from flowanchor.plugins.codecs.identity import Identity


def test_every_byte_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = from_uint8(levels)
    assert pixels.dtype == torch.float32 and pixels[0] == -1 and pixels[-1] == 1
    assert torch.equal(to_uint8(pixels), levels)
    assert torch.equal(to_uint8(pixels.double()), levels)


def test_out_of_range_and_not_a_number():
    wild = torch.tensor([-3.0, 3.0, 0.0, float("nan"), float("inf"), float("-inf")])
    assert to_uint8(wild).tolist() == [0, 255, 128, 0, 255, 0]


def test_input_is_left_alone():
    levels = torch.arange(6, dtype=torch.uint8)
    from_uint8(levels)
    assert levels.tolist() == list(range(6))


def test_identity_codec():
    images = torch.randn(2, 3, 4, 4)
    codec = Identity()
    assert torch.equal(codec.decode(codec.encode(images)), images)
