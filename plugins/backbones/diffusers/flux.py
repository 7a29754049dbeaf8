"""FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.plugins.backbones.diffusers.description import Joint
from flowanchor.plugins.backbones.diffusers.layouts import packed, places, unpacked
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.diffusers.texts import PooledTokens


class Flux1(Joint):
    """Latents [16, h, w]; text of T5 (512 tokens), a pooled vector of CLIP.

    Args:
        guidance: what a network with distilled guidance (dev) is told; 3.5 as its pipeline does.
    """

    stock = "FluxTransformer2DModel"
    pipeline = Pipeline("FluxPipeline", "FluxLoraLoaderMixin")
    targets = (*Joint.targets, "proj_mlp", "proj_out")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    time = "time_text_embed.timestep_embedder"
    size_steps = (2, 2)

    def __init__(self, guidance: float = 3.5) -> None:
        self.guidance = guidance

    def asked(self, config: Any) -> str:
        return f"guidance_scale={self.guidance:g}" if config.guidance_embeds else "guidance_scale=1"

    def channels(self, config: Any) -> int:
        return int(config.in_channels) // 4

    def null(self, config: Any) -> PooledTokens:
        return PooledTokens(torch.zeros(1, config.joint_attention_dim), torch.zeros(config.pooled_projection_dim))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: PooledTokens) -> dict[str, Any]:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        return {
            "hidden_states": packed(x), "timestep": 1 - t, "encoder_hidden_states": cond.tokens,
            "pooled_projections": cond.pooled, "txt_ids": torch.zeros(cond.tokens.shape[1], 3, device=x.device),
            "img_ids": places(rows, columns, x.device),
            "guidance": torch.full_like(t, self.guidance) if network.config.guidance_embeds else None,
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        return unpacked(network.proj_out(network.norm_out(tokens, values["temb"])), shape)
