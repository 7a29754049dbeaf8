"""Sana."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.plugins.backbones.diffusers.description import ATTENTION, Description
from flowanchor.plugins.backbones.diffusers.layouts import unless_whole, unpatched
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.diffusers.texts import MaskedTokens


class Sana(Description):
    """Latents [32, h, w] of DC-AE; text of Gemma 2 (300 tokens), masked, by cross-attention."""

    stock = "SanaTransformer2DModel"
    pipeline = Pipeline("SanaPipeline", "SanaLoraLoaderMixin", uniform=False)
    targets = ATTENTION  # its feed-forward layers are convolutions
    carried = ("timestep", "embedded")
    kept = {"embedded": ("time_embed", 1)}
    time = "time_embed.emb.timestep_embedder"
    usual = (32, 32)
    longest = {"tokens": 300, "mask": 300}

    def check(self, config: Any) -> None:
        if config.guidance_embeds or config.patch_size != 1:
            raise ConfigError("This Sana is told its guidance (Sprint), or has patches: give a plain one.")

    def channels(self, config: Any) -> int:
        return int(config.in_channels)

    def level(self, config: Any, t: Tensor) -> Tensor:
        return (1 - t) * config.timestep_scale

    def null(self, config: Any) -> MaskedTokens:
        return MaskedTokens(torch.zeros(1, config.caption_channels), torch.ones(1, dtype=torch.bool))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: MaskedTokens) -> dict[str, Any]:
        return {
            "hidden_states": x, "timestep": 1000 * self.level(network.config, t), "encoder_hidden_states": cond.tokens,
            "encoder_attention_mask": unless_whole(cond.mask),
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        out = network.proj_out(network.norm_out(tokens, values["embedded"], network.scale_shift_table))
        return unpatched(out, shape, network.config.patch_size)
