"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.plugins.backbones.diffusers.description import ATTENTION, Joint
from flowanchor.plugins.backbones.diffusers.layouts import packed, unless_whole, unpacked
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.diffusers.texts import MaskedTokens


class QwenImage(Joint):
    """Latents [16, h, w]; text of Qwen2.5-VL, masked."""

    stock = "QwenImageTransformer2DModel"
    pipeline = Pipeline("QwenImagePipeline", "QwenImageLoraLoaderMixin", unguided="true_cfg_scale=1")
    targets = (
        *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2",
        "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip
    time = "time_text_embed.timestep_embedder"
    size_steps = (2, 2)
    longest = {"tokens": 1024, "mask": 1024}

    def check(self, config: Any) -> None:
        if config.zero_cond_t:
            raise ConfigError("This Qwen-Image edits images (zero_cond_t): give one of text alone.")

    def channels(self, config: Any) -> int:
        return int(config.in_channels) // 4

    def null(self, config: Any) -> MaskedTokens:
        return MaskedTokens(torch.zeros(1, config.joint_attention_dim), torch.ones(1, dtype=torch.bool))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: MaskedTokens) -> dict[str, Any]:
        return {
            "hidden_states": packed(x), "timestep": 1 - t, "encoder_hidden_states": cond.tokens,
            "encoder_hidden_states_mask": unless_whole(cond.mask),
            "img_shapes": [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        return unpacked(network.proj_out(network.norm_out(tokens, values["temb"])), shape)
