"""Aspect-ratio buckets: a few sizes of one area, so that images of any shape lose little to the crop."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from flowanchor.data.pictures import middle
from flowanchor.errors import ConfigError

MULTIPLE = 16  # of both sides: 8 of Wan's VAE times 2 of a patch

Size = tuple[int, int]  # height, width


def bucket_sizes(side: int, max_ratio: float = 2.0, multiple: int = MULTIPLE) -> list[Size]:
    """Sizes of about `side`^2 pixels, sides multiples of `multiple`, ratios up to `max_ratio`; 1 keeps the square."""
    if side % multiple or side < multiple:
        raise ConfigError(
            f"image_size={side} is no multiple of {multiple}: use for example {max(1, side // multiple) * multiple}."
        )
    if max_ratio < 1:
        raise ConfigError(f"max_ratio={max_ratio} must be at least 1, where every image becomes a square.")
    found = set()
    for height in range(multiple, int(side * math.sqrt(max_ratio)) + multiple, multiple):
        width = max(multiple, round(side * side / height / multiple) * multiple)
        if max(height / width, width / height) <= max_ratio + 1e-9:
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose ratio is nearest to that of an image."""
    wanted = math.log(size[0] / size[1])
    return min(sizes, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - wanted), bucket))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """The image scaled until it covers the bucket, and its centre; a line of pixels is cut first."""
    image = middle(image)
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC, reducing_gap=None)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
