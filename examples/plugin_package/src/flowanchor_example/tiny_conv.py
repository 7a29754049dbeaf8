"""A small residual convolutional network as a chain of stages."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext


class TinyConv(Backbone):
    """Residual blocks at full resolution, each scaled and shifted by time and class (FiLM, arXiv 1709.07871).

    Args:
        channels, size: shape of a sample, [channels, size, size].
        num_classes: 0 for unlabelled data.
        width: channels of the hidden layers.
        depth: number of blocks.
        class_dropout_prob: share of the labels that training replaces by the null class, for guidance.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int = 0,
        width: int = 32,
        depth: int = 3,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        if width % 8:
            raise ConfigError(f"backbone.width={width} does not divide into 8 groups: choose a multiple of 8.")
        self.sample_shape = (channels, size, size)
        if num_classes:
            self.conditioning = Classes(num_classes, null=class_dropout_prob > 0, dropout=class_dropout_prob)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None  # the last one is the null class
        self.blocks = nn.ModuleList(FilmBlock(width) for _ in range(depth))
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def embed(self, x: Tensor, t: Tensor, cond: Tensor | None, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        """x [B, C, H, W], t [B], labels [B] -> features [B, width, H, W] and the modulation [B, width]."""
        rates = math.pi * torch.arange(1, 17, device=t.device, dtype=t.dtype) / 2
        angles = t[:, None] * rates  # time up to 2 (the expanded interval) is told apart from time below 1
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.classes is not None:
            if cond is None:
                raise ConfigError("This TinyConv was built for labels: pass them, or set data.num_classes=0.")
            c = c + self.classes(cond)
        return self.stem(x), StageContext(carried=(c,))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        """[B, width, H, W] -> velocity [B, C, H, W]; zero before training."""
        return self.out(nn.functional.silu(self.norm(tokens)))


class FilmBlock(nn.Module):
    """`x + conv(silu(norm(x) (1 + scale) + shift))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.film = nn.Linear(width, 2 * width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        scale, shift = self.film(context.carried[0])[:, :, None, None].chunk(2, dim=1)
        return tokens + self.conv(nn.functional.silu(self.norm(tokens) * (1 + scale) + shift))
