"""PixArt, as an architecture: its released weights predict noise on a diffusion's schedule, and are no flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.plugins.backbones.diffusers.description import Description
from flowanchor.plugins.backbones.diffusers.layouts import unless_whole, unpatched
from flowanchor.plugins.backbones.diffusers.texts import MaskedTokens


class PixArt(Description):
    """Latents [4, h, w], trained from scratch; text of T5 (300 tokens), masked, by cross-attention."""

    stock = "PixArtTransformer2DModel"
    carried = ("timestep", "embedded")
    kept = {"embedded": ("adaln_single", 1)}
    time = "adaln_single.emb.timestep_embedder"
    size_steps = (2, 2)
    longest = {"tokens": 300, "mask": 300}

    def check(self, config: Any) -> None:
        if config.out_channels not in (None, config.in_channels):
            raise ConfigError(
                f"A PixArt with {config.out_channels} output channels for {config.in_channels} predicts noise and "
                "variance, and is no flow model: train one from scratch, backbone/description=pixart and "
                "out_channels as in_channels in backbone.settings."
            )
        if config.use_additional_conditions or config.sample_size == 128:
            raise ConfigError("PixArt is not told sizes here: set sample_size other than 128 in backbone.settings.")

    def channels(self, config: Any) -> int:
        return int(config.in_channels)

    def null(self, config: Any) -> MaskedTokens:
        return MaskedTokens(torch.zeros(1, config.caption_channels), torch.ones(1, dtype=torch.bool))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: MaskedTokens) -> dict[str, Any]:
        return {
            "hidden_states": x, "timestep": 1000 * (1 - t), "encoder_hidden_states": cond.tokens,
            "encoder_attention_mask": unless_whole(cond.mask),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        shift, scale = (network.scale_shift_table[None] + values["embedded"][:, None]).chunk(2, 1)
        return unpatched(
            network.proj_out(network.norm_out(tokens) * (1 + scale) + shift), shape, network.config.patch_size
        )
