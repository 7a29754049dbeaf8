"""HunyuanVideo 1.5, from text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.plugins.backbones.diffusers.description import Joint
from flowanchor.plugins.backbones.diffusers.layouts import unpatched_video
from flowanchor.plugins.backbones.diffusers.texts import TwoTexts


class HunyuanVideo15(Joint):
    """Latents [32, f, h, w]; text of Qwen2.5-VL (1,000 tokens), and of ByT5 (256) for words that are to be written.

    It is given no image: neither latents of one nor, where the pipeline gives masked zeros, tokens.
    """

    stock = "HunyuanVideo15Transformer3DModel"
    out = ("hidden_states", "encoder_hidden_states")
    time = "time_embed.timestep_embedder"
    frames = True
    usual = (31, 30, 52)
    longest = {"tokens": 1000, "mask": 1000, "tokens_2": 256, "mask_2": 256}
    masks_padding = True

    def channels(self, config: Any) -> int:
        return int(config.out_channels or config.in_channels)

    def null(self, config: Any) -> TwoTexts:
        one = torch.ones(1, dtype=torch.bool)
        return TwoTexts(
            torch.zeros(1, config.text_embed_dim), one, torch.zeros(1, config.text_embed_2_dim), one.clone()
        )

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: TwoTexts) -> dict[str, Any]:
        none = x.new_zeros(len(x), network.config.in_channels - x.shape[1], *x.shape[2:])  # latents of an image, mask
        return {
            "hidden_states": torch.cat([x, none], 1),
            "timestep": (1000 * (1 - t)).to(x.dtype),  # it embeds times in the type that they have
            "encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask,
            "encoder_hidden_states_2": cond.tokens_2, "encoder_attention_mask_2": cond.mask_2,
            "image_embeds": x.new_zeros(len(x), 0, network.config.image_embed_dim),
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        side = network.config.patch_size
        out = network.proj_out(network.norm_out(tokens, values["temb"]))
        return unpatched_video(out, shape, (network.config.patch_size_t, side, side))
