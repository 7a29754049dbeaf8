"""The codec of networks that work on pixels."""

from __future__ import annotations

from torch import Tensor

from flowanchor.interfaces import Codec


class Identity(Codec):
    """Samples are images in [-1, 1] already: nothing is encoded and nothing is decoded."""

    name = "identity"

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def encode(self, images: Tensor) -> Tensor:
        return images
