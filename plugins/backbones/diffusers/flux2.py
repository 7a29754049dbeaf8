"""FLUX.2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowanchor.plugins.backbones.diffusers.description import ATTENTION, Joint
from flowanchor.plugins.backbones.diffusers.layouts import flattened, places, unflattened
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.text.base import Tokens


class Flux2(Joint):
    """Latents [128, h, w], squares of 2 x 2 in their channels; text of three layers of a language model (512 tokens).

    Args:
        guidance: what a network with distilled guidance (dev) is told; 4 as its pipeline does.
    """

    stock = "Flux2Transformer2DModel"
    pipeline = Pipeline("Flux2Pipeline", "Flux2LoraLoaderMixin")
    targets = (
        *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.linear_in", "ff.linear_out",
        "ff_context.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj", "attn.to_out",
    )  # fmt: skip
    blocks = ("transformer_blocks", "single_transformer_blocks")
    carried = ("temb", "temb_mod_img", "temb_mod_txt", "single")
    kept = {"temb": ("time_guidance_embed", None), "single": ("single_stream_modulation", None)}
    renames = {"single_transformer_blocks": {"joined": "hidden_states", "temb_mod": "single"}}
    time = "time_guidance_embed.timestep_embedder"
    usual = (64, 64)

    def __init__(self, guidance: float = 4.0) -> None:
        self.guidance = guidance

    def drawn_by(self, config: Any) -> Pipeline:
        """klein has no embedding of guidance, and a pipeline of its own."""
        return self.pipeline if config.guidance_embeds else replace(self.pipeline, name="Flux2KleinPipeline")

    def asked(self, config: Any) -> str:
        return f"guidance_scale={self.guidance:g}" if config.guidance_embeds else "guidance_scale=1"

    def channels(self, config: Any) -> int:
        return int(config.in_channels)

    def null(self, config: Any) -> Tokens:
        return Tokens(torch.zeros(1, config.joint_attention_dim))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: Tokens) -> dict[str, Any]:
        order = torch.arange(cond.tokens.shape[1], device=x.device)[:, None]
        return {
            "hidden_states": flattened(x), "timestep": 1 - t, "encoder_hidden_states": cond.tokens,
            "txt_ids": torch.cat([torch.zeros(len(order), 3, device=x.device), order], 1),
            "img_ids": places(x.shape[2], x.shape[3], x.device, width=4),
            "guidance": torch.full_like(t, self.guidance) if network.config.guidance_embeds else None,
        }  # fmt: skip

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        return unflattened(network.proj_out(network.norm_out(tokens, values["temb"])), shape)
