"""What a run of the product is given that has neither data nor weights: random latents, networks, a teacher."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from flowanchor.checkpoints.load import store_low
from flowanchor.data.base import FlowDataModule
from flowanchor.data.images import ImageSet
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Batch
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity, keeps_low
from flowanchor.text.base import Tokens


class MadeUp(FlowDataModule):
    """`samples` random latents, [C, h, w] with labels or [C, F, h, w] with texts [text_len, text_dim]."""

    name = "made_up"

    def __init__(
        self,
        samples: int,
        channels: int,
        size: int,
        num_classes: int,
        frames: int,
        height: int,
        width: int,
        text_len: int,
        text_dim: int,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.channels, self.size, self.num_classes = channels, size, num_classes
        draw = torch.Generator().manual_seed(0)
        shape = (channels, frames, height, width) if text_len else (channels, size, size)
        self.latents = torch.randn(samples, *shape, generator=draw)
        if text_len:
            self.cond: Any = Tokens(0.1 * torch.randn(samples, text_len, text_dim, generator=draw))
            self.null_condition = Tokens(torch.zeros(text_len, text_dim))
        else:
            self.cond = torch.randint(0, num_classes, (samples,), generator=draw)

    def load(self) -> dict[str, ImageSet]:
        raise ConfigError("Made-up latents have no images: leave out what draws or measures any.")

    def examples(self, split: str) -> Dataset:
        return _Examples(self.latents, self.cond)

    def val_dataloader(self) -> Any:
        return []


class _Examples(Dataset):
    def __init__(self, latents: Tensor, cond: Any) -> None:
        self.latents, self.cond = latents, cond

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(self.latents[indices], tree_map(lambda part: part[indices], self.cond))


def _somewhere(network: Backbone) -> Backbone:
    """Every weight random: at an initialisation zero gates and a zero head would make half of a network idle."""
    for name, p in network.named_parameters():
        if p.requires_grad and not p.is_meta:
            nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.02)
    return network


def _device() -> torch.device:
    """Large networks are made where they will live; a deferred one stays without values."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lightningdit(preset: str, **settings: Any) -> Backbone:
    with _device():
        return _somewhere(LightningDiT.from_preset(preset, **settings))


def wan(preset: str, **settings: Any) -> Backbone:
    from flowanchor.plugins.backbones.wan import Wan  # needs diffusers

    with _device():
        return _somewhere(Wan.from_preset(preset, **settings))


def teacher(
    network: Any, guidance_scale: float, guidance_low: float, guidance_high: float, dtype: str, precision: str | int
) -> CheckpointVelocity:
    """The field of `teacher=checkpoint` around a random network, kept in the same type as there."""
    made = network if isinstance(network, Backbone) else instantiate(network)
    field = CheckpointVelocity.of_network(made, Guidance(guidance_scale, guidance_low, guidance_high))
    field.low = keeps_low(dtype, precision)
    if field.low:
        store_low(made, torch.bfloat16)
    return field
