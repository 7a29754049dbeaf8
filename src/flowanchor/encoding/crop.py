"""The centre crop that class-conditional ImageNet models are trained on (ADM's, used by DiT, SiT and LightningDiT)."""

from __future__ import annotations

from PIL import Image

from flowanchor.data.pictures import middle
from flowanchor.encoding.buckets import Size


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """A square of `size` pixels from the middle.

    As in ADM (arXiv 2105.05233, its released data loader): halve by averaging while the shorter side is at least twice
    the size, then resize it to the size by a bicubic filter, then cut. A line of pixels is cut first.
    """
    image = middle(image)
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def square(image: Image.Image, size: Size) -> Image.Image:
    """`center_crop` to a size of equal sides."""
    return center_crop(image, size[0])
