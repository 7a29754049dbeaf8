"""Eight bits per channel out of whatever Pillow has decoded: deep and floating-point pictures, transparency, CIELAB.

`Image.convert` alone cuts off what is above 255, so that a picture of 16 bits becomes white; and it drops transparency,
so that a drawing on nothing becomes one on whatever colour its maker's program left there.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

DEEP = 65_535  # the white of 16 bits
BITS, PHOTOMETRIC = 258, 262  # TIFF's tags


def eight_bit(image: Image.Image, mode: str) -> Image.Image:
    """A decoded picture in mode `RGB` or `L`; raises `ValueError` for values of which nobody knows what white is.

    16 bits: the upper eight of them, as Pillow reads colours of 16 bits. Floating point: 0 is black and 1 is white.
    Transparency: laid on white.
    """
    if image.mode.startswith(("I", "F")):
        image = _from_numbers(image)
    elif image.mode == "LAB":
        image = _from_lab(image)
    if image.mode in ("La", "RGBa"):  # multiplied by its opacity
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = _on_white(image)
    return image.convert(mode)


def _from_numbers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    told = f"values from {low:g} to {high:g}"
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # of what is not a number neither holds
            raise ValueError(f"{told}, and floating-point values are read from 0 to 1")
        gray = (255 * values).round()
    else:
        # Of 32 bits, small numbers may be a dark picture of 16 bits as well as one of 8.
        unknown = image.mode == "I" and image.format == "TIFF" and high < 256
        if low < 0 or high > DEEP or unknown:
            raise ValueError(f"{told} in 32 bits, and whole numbers are read as 16 bits")
        if image.format == "TIFF" and tags.get(PHOTOMETRIC) == 0:  # of one channel: 0 is white
            values = DEEP - values
        twelve = image.format == "TIFF" and tags.get(BITS) == (12,)
        gray = values >> (4 if twelve else 8)
    found = Image.fromarray(gray.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        found.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    return found


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    found = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))
    assert found is not None
    return found


def _on_white(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, as the pixels were
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), drawn).convert("RGB")
