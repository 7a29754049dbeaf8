"""Krea 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.plugins.backbones.diffusers.description import ATTENTION, Description
from flowanchor.plugins.backbones.diffusers.layouts import packed, places, unless_whole, unpacked
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.diffusers.texts import MaskedTokens


class Krea2(Description):
    """Latents [16, h, w]; text of several layers of Qwen3-VL side by side, [L, layers, D], masked. The network joins
    text and image itself."""

    stock = "Krea2Transformer2DModel"
    sinusoids = False
    pipeline = Pipeline("Krea2Pipeline", "Krea2LoraLoaderMixin", unguided="guidance_scale=0")
    targets = (*ATTENTION, "to_gate", "ff.gate", "ff.up", "ff.down")
    carried = ("temb", "embedded")
    kept = {"embedded": ("time_embed", None)}
    ends = ("final_layer",)
    last = "final_layer.linear"
    time = "time_embed"
    size_steps = (2, 2)
    longest = {"tokens": 512, "mask": 512}

    def channels(self, config: Any) -> int:
        return int(config.in_channels) // 4

    def null(self, config: Any) -> MaskedTokens:
        text = torch.zeros(1, config.num_text_layers, config.text_hidden_dim)
        return MaskedTokens(text, torch.ones(1, dtype=torch.bool))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: MaskedTokens) -> dict[str, Any]:
        image = places(x.shape[2] // 2, x.shape[3] // 2, x.device)
        return {
            "hidden_states": packed(x), "timestep": 1 - t, "encoder_hidden_states": cond.tokens,
            "encoder_attention_mask": unless_whole(cond.mask),
            "position_ids": torch.cat([torch.zeros(cond.tokens.shape[1], 3, device=x.device), image]),
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        image = tokens[:, -(shape[2] // 2) * (shape[3] // 2) :]
        return unpacked(network.final_layer(image, values["embedded"]), shape)
