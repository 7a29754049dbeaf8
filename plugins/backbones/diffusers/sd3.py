"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.plugins.backbones.diffusers.description import Joint
from flowanchor.plugins.backbones.diffusers.layouts import unpatched
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.diffusers.texts import PooledTokens


class StableDiffusion3(Joint):
    """Latents [16, h, w]; text of CLIP (77 tokens) and T5 (256), pooled vectors of CLIP."""

    stock = "SD3Transformer2DModel"
    pipeline = Pipeline("StableDiffusion3Pipeline", "SD3LoraLoaderMixin", uniform=False)
    time = "time_text_embed.timestep_embedder"
    size_steps = (2, 2)
    longest = {"tokens": 77 + 256}

    def channels(self, config: Any) -> int:
        return int(config.in_channels)

    def null(self, config: Any) -> PooledTokens:
        return PooledTokens(torch.zeros(1, config.joint_attention_dim), torch.zeros(config.pooled_projection_dim))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: PooledTokens) -> dict[str, Any]:
        return {
            "hidden_states": x, "timestep": 1000 * (1 - t), "encoder_hidden_states": cond.tokens,
            "pooled_projections": cond.pooled,
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        return unpatched(network.proj_out(network.norm_out(tokens, values["temb"])), shape, network.config.patch_size)
