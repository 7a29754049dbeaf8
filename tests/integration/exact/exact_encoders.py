"""A codec and a text encoder whose arithmetic is exact, so that what they encode is the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowanchor.interfaces import Codec, Posterior
from flowanchor.text.base import TextEncoder, Tokens


class EveryOther(Codec):
    """Keeps every other pixel; the log-variance is 0, whose standard deviation is exactly 1."""

    name, downsampling, latent_channels = "every-other", 2, 3

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def encode(self, images: Tensor) -> Tensor:
        return images[..., ::2, ::2].mul(0.5)

    def posterior(self, images: Tensor) -> Posterior:
        mean = images[..., ::2, ::2]
        return Posterior(mean, torch.zeros_like(mean))


class Letters(TextEncoder):
    """One embedding per letter, of whole numbers."""

    name, width = "letters", 4

    def encode(self, prompts: Sequence[str]) -> list[Tokens]:
        return [
            Tokens(torch.tensor([[ord(letter), place, 1, 0] for place, letter in enumerate(f"{prompt}.")]).float())
            for prompt in prompts
        ]

    def fingerprint(self) -> str:
        return "letters"
