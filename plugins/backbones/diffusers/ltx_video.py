"""LTX-Video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.plugins.backbones.diffusers.description import Description
from flowanchor.plugins.backbones.diffusers.layouts import flattened, unflattened, unless_whole
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.diffusers.texts import MaskedTokens

STRIDES = (8, 32, 32)  # of its VAE: frames, rows, columns


class LTXVideo(Description):
    """Latents [128, f, h, w]; text of T5 (128 tokens), masked, by cross-attention.

    Positions are told in seconds and pixels: without that scale the same weights are another network.

    Args:
        frame_rate: frames per second of the videos; 25 as its pipeline assumes.
    """

    stock = "LTXVideoTransformer3DModel"
    pipeline = Pipeline("LTXPipeline", "LTXVideoLoraLoaderMixin", takes_levels=False, prefix="diffusion_model.")
    carried = ("temb", "embedded")
    kept = {"embedded": ("time_embed", 1)}
    time = "time_embed.emb.timestep_embedder"
    frames = True
    usual = (21, 16, 22)
    longest = {"tokens": 128, "mask": 128}

    def __init__(self, frame_rate: float = 25.0) -> None:
        if not frame_rate > 0:
            raise ConfigError(f"backbone.description.frame_rate={frame_rate} is none: use for example 25.")
        self.frame_rate = frame_rate

    def channels(self, config: Any) -> int:
        return int(config.in_channels)

    def null(self, config: Any) -> MaskedTokens:
        return MaskedTokens(torch.zeros(1, config.caption_channels), torch.ones(1, dtype=torch.bool))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: MaskedTokens) -> dict[str, Any]:
        frames, rows, columns = x.shape[2:]
        mask = unless_whole(cond.mask)
        return {
            "hidden_states": flattened(x), "timestep": 1000 * (1 - t), "encoder_hidden_states": cond.tokens,
            "encoder_attention_mask": mask, "num_frames": frames, "height": rows, "width": columns,
            "rope_interpolation_scale": (STRIDES[0] / self.frame_rate, *STRIDES[1:]),
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        shift, scale = (network.scale_shift_table[None] + values["embedded"].flatten(1)[:, None]).chunk(2, 1)
        return unflattened(network.proj_out(network.norm_out(tokens) * (1 + scale) + shift), shape)
